"""Compares greedy tokens of two engines, up to near ties.

Sums in another order may turn a near tie; from there on two engines write
different texts, and both are right.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.checkpoints.huggingface import load_huggingface
from jaxtrain.models.transformer import Transformer

_TIE = 1e-3


class Ties:
  """Looks at the logits where tokens part.

  Args:
    model: Directory of the Hugging Face layout.
    max_seq_len: Longest sequence.
  """

  def __init__(self, model: str, max_seq_len: int):
    self._path = model
    self._max_seq_len = max_seq_len
    self._last_logits = None

  def __call__(
    self,
    prompts: list[list[int]],
    ours: list[list[int]],
    theirs: list[list[int]],
  ) -> dict[str, int]:
    """Counts requests that part at a near tie, and those that just differ."""
    near = differing = 0
    for prompt, mine, other in zip(prompts, ours, theirs, strict=True):
      if len(mine) != len(other):
        differing += 1
      elif mine != other:
        i = int(np.argmax(np.array(mine) != np.array(other)))
        row = self._logits(prompt + mine[:i])
        gap = row.max() - min(row[mine[i]], row[other[i]])
        near += gap < _TIE
        differing += gap >= _TIE
    return {'near_ties': int(near), 'differing': int(differing)}

  def _logits(self, tokens):
    if self._last_logits is None:
      config, params = load_huggingface(self._path)
      model = Transformer(config)

      @jax.jit
      def last_logits(ids, last):
        at = lambda x: jax.lax.dynamic_slice_in_dim(x, last, 1, axis=1)
        return model.apply({'params': params}, ids, select=at)[0][0, 0]

      self._last_logits = last_logits
    ids = np.zeros((1, self._max_seq_len), np.int32)
    ids[0, : len(tokens)] = tokens
    last = jnp.asarray(len(tokens) - 1)
    return np.asarray(self._last_logits(ids, last))
