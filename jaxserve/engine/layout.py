"""One int32 buffer for everything a step sends to the device.

A step needs two dozen small arrays; one copy of one buffer costs a fraction of
as many. Floats travel as their bits.

Letters: T tokens of the bucket, S rows, M pages per row, U tokens that can be
sampled, or looked up, in one step (the smaller of T and S), E tokens that end a
row.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.attention.base import Batch
from jaxserve.samplers.base import Rows

_FLOATS = (
  'temperature',
  'top_p',
  'min_p',
  'presence_penalty',
  'frequency_penalty',
  'repetition_penalty',
)
# Of `Rows`; its other fields follow from these.
_ROWS = (
  'top_k',
  'seed',
  'prompt_len',
  'features',
  'min_position',
  *_FLOATS,
)
# What padding holds, and what a row that asks for nothing leaves alone.
_UNUSED = dict(
  slot=-1,
  num_logprobs=-1,
  target=-1,
  stop_ids=-1,
  top_p=1.0,
  repetition_penalty=1.0,
)


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where each field of a step lies in the buffer of one token bucket.

  Fields that `empty` does not leave as nearly every row wants them, beside the
  obvious: `tokens` (-1 is what the row's history has at the token's position),
  `token_row` and `sample_row` (rows of the batch), `target` (-1 samples; else
  the token whose log-probability is wanted, and nothing is sampled),
  `num_logprobs` (-1 wants none), `wants_processed` (1 wants log-probabilities
  of the distribution that is drawn from, not the model's own). With several
  steps: `steps_left` (tokens a row may still sample) and `stop_ids`.

  Attributes:
    num_tokens: T.
    num_rows: S.
    pages_per_row: M.
    num_steps: Steps of one call. With several, every row decodes: token u is
      that of sampled row u.
    num_stop_ids: E.
  """

  num_tokens: int
  num_rows: int
  pages_per_row: int
  num_steps: int = 1
  num_stop_ids: int = 0

  @property
  def name(self) -> str:
    """What its program is called."""
    steps = f' x {self.num_steps}' if self.num_steps > 1 else ''
    return f'step {self.num_tokens}{steps}'

  @property
  def num_samples(self) -> int:
    """U."""
    return min(self.num_tokens, self.num_rows)

  @functools.cached_property
  def fields(self) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Name -> offset and shape."""
    t, s, u = self.num_tokens, self.num_rows, self.num_samples
    shapes = dict(
      tokens=(t,),
      positions=(t,),
      slot=(t,),
      token_row=(t,),
      query_start=(s + 1,),
      kv_len=(s,),
      page_table=(s, self.pages_per_row),
      sample_index=(u,),
      sample_row=(u,),
      num_logprobs=(u,),
      target=(u,),
      wants_processed=(u,),
      **{name: (u,) for name in _ROWS},
    )
    if self.num_steps > 1:
      shapes |= dict(steps_left=(u,), stop_ids=(u, self.num_stop_ids))
    offsets, end = {}, 0
    for name, shape in shapes.items():
      offsets[name] = (end, shape)
      end += math.prod(shape)
    return offsets

  @functools.cached_property
  def size(self) -> int:
    """Length of the buffer."""
    return sum(math.prod(shape) for _, shape in self.fields.values())

  def empty(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A buffer of padding, and writable views of its fields."""
    buffer = self._padding.copy()
    return buffer, self._views(buffer)

  @functools.cached_property
  def _padding(self):
    buffer = np.zeros(self.size, np.int32)
    views = self._views(buffer)
    for name, value in (_UNUSED | dict(sample_row=self.num_rows)).items():
      if name in views:
        views[name][:] = value
    return buffer

  def _views(self, buffer):
    floats = buffer.view(np.float32)
    views = {}
    for name, (offset, shape) in self.fields.items():
      base = floats if name in _FLOATS else buffer
      view = base[offset : offset + math.prod(shape)]
      views[name] = view.reshape(shape) if len(shape) > 1 else view
    return views

  def unpack(self, buffer: jax.Array) -> dict[str, jax.Array]:
    """The fields, on the device."""
    fields = {}
    for name, (offset, shape) in self.fields.items():
      x = buffer[offset : offset + math.prod(shape)].reshape(shape)
      if name in _FLOATS:
        x = jax.lax.bitcast_convert_type(x, jnp.float32)
      fields[name] = x
    return fields

  def batch(self, f: dict[str, jax.Array], tokens: jax.Array) -> Batch:
    """What attention reads of a step that runs `tokens`."""
    return Batch(
      tokens=tokens,
      positions=f['positions'],
      slot=f['slot'],
      query_start=f['query_start'],
      kv_len=f['kv_len'],
      page_table=f['page_table'],
    )

  def rows(self, f: dict[str, jax.Array]) -> Rows:
    """The sampling parameters."""
    return Rows(
      row=f['sample_row'],
      position=f['positions'][f['sample_index']] + 1,
      **{name: f[name] for name in _ROWS},
    )
