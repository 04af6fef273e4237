"""Temperature, top-k, top-p and min-p sampling, exact, without a sort.

* top-k: Fan et al., https://arxiv.org/abs/1805.04833, section 5.
* top-p: Holtzman et al., https://arxiv.org/abs/1904.09751, equation 2.
* min-p: Nguyen et al., https://arxiv.org/abs/2407.01082, section 3.

`pallas_kernels.sampling` does it, and says how ties and the order of the cuts
are settled. A row takes one random number, so nothing as large as the logits is
drawn.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.samplers.base import Rows
from jaxserve.samplers.base import Sampler
from pallas_kernels.sampling import keep
from pallas_kernels.sampling import sampling


def truncated() -> Sampler:
  """The sampler."""
  return Truncated()


@dataclasses.dataclass(frozen=True)
class Truncated:
  """Rows of temperature 0 take the first of the likeliest tokens."""

  def __call__(
    self, logits: Float[Array, 'U V'], rows: Rows
  ) -> Int[Array, 'U']:
    """See `base.Sampler`."""
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

  def distribution(
    self, logits: Float[Array, 'U V'], rows: Rows
  ) -> Float[Array, 'U V']:
    """See `base.Sampler`; rows of temperature 0 have one certain token."""
    is_greedy = (rows.temperature <= 0)[:, None]
    scaled = logits / jnp.where(is_greedy, 1.0, rows.temperature[:, None])
    kept = keep(scaled, rows.top_k, rows.top_p, rows.min_p)
    tokens = jnp.arange(logits.shape[-1])
    best = jnp.argmax(logits, axis=-1)[:, None]
    kept = jnp.where(is_greedy, tokens == best, kept)
    return jax.nn.log_softmax(jnp.where(kept, scaled, -jnp.inf), axis=-1)


def _uniform(seed, position):
  key = jax.random.fold_in(jax.random.key(seed.astype(jnp.uint32)), position)
  return jax.random.uniform(key)
