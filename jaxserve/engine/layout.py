"""One int32 buffer for everything a step sends to the device.

A step needs a dozen small arrays; one copy of one buffer costs a fraction of a
dozen. Floats travel as their bits.

Letters: T tokens of the bucket, S rows, M pages per row, U rows that can sample
in one step (the smaller of T and S).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.attention.base import Batch
from jaxserve.samplers.base import Rows

_FLOATS = ('temperature', 'top_p', 'min_p')


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where each field of a step lies in the buffer of one token bucket.

  Attributes:
    num_tokens: T.
    num_rows: S.
    pages_per_row: M.
  """

  num_tokens: int
  num_rows: int
  pages_per_row: int

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
      query_start=(s + 1,),
      kv_len=(s,),
      page_table=(s, self.pages_per_row),
      token_row=(t,),
      sample_index=(u,),
      sample_row=(u,),
      num_logprobs=(u,),
      seed=(u,),
      top_k=(u,),
      **{name: (u,) for name in _FLOATS},
    )
    offsets, end = {}, 0
    for name, shape in shapes.items():
      offsets[name] = (end, shape)
      end += math.prod(shape)
    return offsets

  @property
  def size(self) -> int:
    """Length of the buffer."""
    offset, shape = self.fields['min_p']
    return offset + math.prod(shape)

  def empty(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A buffer of padding, and writable views of its fields."""
    buffer = np.zeros(self.size, np.int32)
    views = {}
    for name, (offset, shape) in self.fields.items():
      view = buffer[offset : offset + math.prod(shape)].reshape(shape)
      views[name] = view.view(np.float32) if name in _FLOATS else view
    views['slot'][:] = -1
    views['sample_row'][:] = self.num_rows
    views['num_logprobs'][:] = -1
    views['top_p'][:] = 1.0
    return buffer, views

  def unpack(self, buffer: jax.Array) -> dict[str, jax.Array]:
    """The fields, on the device."""
    fields = {}
    for name, (offset, shape) in self.fields.items():
      x = buffer[offset : offset + math.prod(shape)].reshape(shape)
      if name in _FLOATS:
        x = jax.lax.bitcast_convert_type(x, jnp.float32)
      fields[name] = x
    return fields

  def batch(self, f: dict[str, jax.Array], last_tokens: jax.Array) -> Batch:
    """The tokens to run; -1 stands for the row's last sampled token."""
    tokens = jnp.where(
      f['tokens'] < 0, last_tokens[f['token_row']], f['tokens']
    )
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
      temperature=f['temperature'],
      top_k=f['top_k'],
      top_p=f['top_p'],
      min_p=f['min_p'],
      seed=f['seed'],
      position=f['positions'][f['sample_index']] + 1,
    )
