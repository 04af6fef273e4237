"""How far serving is from training: log-probabilities, two ways.

An engine computes in chunks, over pages, in its own kernels; a trainer computes
whole sequences. What reinforcement learning calls the importance ratio starts
from the difference: https://arxiv.org/abs/1707.06347, equation 6.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.engine.outputs import RequestOutput
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Parity:
  """Differences of log-probabilities, in nats, over all served tokens.

  Attributes:
    num_tokens: How many.
    mean: Mean absolute difference.
    max: Largest absolute difference.
  """

  num_tokens: int
  mean: float
  max: float


def logprob_parity(
  config: ModelConfig,
  params: Any,
  outputs: Sequence[RequestOutput],
  dtype: Any = None,
) -> Parity:
  """Compares the log-probabilities served with a trainer's own forward.

  Args:
    config: Architecture.
    params: Parameter tree of the trainer.
    outputs: Served with `SamplingParams(logprobs=0)` or more, raw.
    dtype: Compute dtype of the trainer; that of the parameters by default.

  Raises:
    ValueError: An output without log-probabilities, or no token at all.
  """
  if dtype is None:
    dtype = params['embed']['embedding'].dtype
  model = Transformer(config, dtype=dtype)

  @jax.jit
  def forward(params, tokens):
    logits = model.apply({'params': params}, tokens[None])[0][0]
    logprobs = jax.nn.log_softmax(logits[:-1], axis=-1)
    return jnp.take_along_axis(logprobs, tokens[1:, None], axis=-1)[:, 0]

  differences = []
  for out in outputs:
    for c in out.outputs:
      if c.logprobs is None:
        raise ValueError(
          f'request {out.request_id} was served without log-probabilities: '
          'ask for SamplingParams(logprobs=0)'
        )
      ids = [*out.prompt_token_ids, *c.token_ids]
      # Few lengths, few programs; what comes later changes nothing before.
      padded = np.zeros(-(-len(ids) // 128) * 128, np.int32)
      padded[: len(ids)] = ids
      own = np.asarray(forward(params, padded))
      first = len(out.prompt_token_ids) - 1
      served = [lp.logprob for lp in c.logprobs]
      differences += np.abs(own[first : first + len(served)] - served).tolist()
  if not differences:
    raise ValueError('there are no served tokens to compare')
  return Parity(
    len(differences), float(np.mean(differences)), float(np.max(differences))
  )
