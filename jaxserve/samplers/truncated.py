"""Temperature, top-k, top-p and min-p sampling, exact, without a sort.

* top-k: Fan et al., https://arxiv.org/abs/1805.04833, section 5.
* top-p: Holtzman et al., https://arxiv.org/abs/1904.09751, equation 2.
* min-p: Nguyen et al., https://arxiv.org/abs/2407.01082, section 3.

`pallas_kernels.sampling` does it, and says how ties and the order of the cuts
are settled. A row takes one random number, so nothing as large as the logits is
drawn.
"""

import jax
import jax.numpy as jnp

from jaxserve.samplers import base
from pallas_kernels.sampling import sampling


def truncated() -> base.Sampler:
  """The sampler; rows of temperature 0 take the argmax."""

  def sample(logits, rows):
    # All greedy, most batches need no cut.
    return jax.lax.cond(
      jnp.any(rows.temperature > 0),
      lambda: sampling(
        logits,
        rows.temperature,
        rows.top_k,
        rows.top_p,
        rows.min_p,
        jax.vmap(_uniform)(rows.seed, rows.position),
      ),
      lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32),
    )

  return sample


def _uniform(seed, position):
  key = jax.random.fold_in(jax.random.key(seed.astype(jnp.uint32)), position)
  return jax.random.uniform(key)
