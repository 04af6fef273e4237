"""Makes and changes the `RowState` of an engine: what its rows keep on device.

Letters: S rows, M longest sequence, C biased tokens, E stop tokens, V vocab,
W = ceil(V / 32) words of a mask, T tokens, G masks set at once.
"""

from collections.abc import Sequence
import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32
import numpy as np

from jaxserve.samplers.base import RowState

ALL_ALLOWED = np.uint32(0xFFFFFFFF)


@dataclasses.dataclass(frozen=True)
class RowSizes:
  """Sizes of a `RowState`.

  Attributes:
    num_rows: S.
    max_seq_len: M.
    vocab_size: V.
    max_logit_bias: C.
    max_stop_ids: E.
  """

  num_rows: int
  max_seq_len: int
  vocab_size: int
  max_logit_bias: int
  max_stop_ids: int

  @property
  def num_words(self) -> int:
    """W."""
    return -(-self.vocab_size // 32)

  @property
  def row_shapes(self) -> dict[str, tuple[int, ...]]:
    """Where each field lies in the buffer of `set_row`, in order."""
    return dict(
      row=(),
      history=(self.max_seq_len,),
      bias_ids=(self.max_logit_bias,),
      bias=(self.max_logit_bias,),
      stop_ids=(self.max_stop_ids,),
      mask=(self.num_words,),
    )

  @property
  def row_size(self) -> int:
    """Length of the buffer of `set_row`."""
    return sum(math.prod(shape) for shape in self.row_shapes.values())


def allocate(
  sizes: RowSizes, sharding: jax.sharding.Sharding | None = None
) -> RowState:
  """The state of rows of which nothing is known."""
  s = sizes

  def make():
    return RowState(
      history=jnp.zeros((s.num_rows, s.max_seq_len), jnp.int32),
      bias_ids=jnp.full((s.num_rows, s.max_logit_bias), -1, jnp.int32),
      bias=jnp.zeros((s.num_rows, s.max_logit_bias), jnp.float32),
      stop_ids=jnp.full((s.num_rows, s.max_stop_ids), -1, jnp.int32),
      mask=jnp.full((s.num_rows, s.num_words), ALL_ALLOWED),
    )

  return jax.jit(make, out_shardings=sharding)()


def record(
  state: RowState,
  row: Int[Array, 'T'],
  position: Int[Array, 'T'],
  token: Int[Array, 'T'],
) -> RowState:
  """Enters tokens in the history; rows past the last are dropped."""
  history = state.history.at[row, position].set(token, mode='drop')
  return dataclasses.replace(state, history=history)


def pack_row(
  sizes: RowSizes,
  row: int,
  *,
  tokens: Sequence[int] = (),
  bias_ids: Sequence[int] = (),
  bias: Sequence[float] = (),
  stop_ids: Sequence[int] = (),
  mask: UInt32[np.ndarray, 'W'] | None = None,
) -> np.ndarray:
  """The buffer of `set_row`; see `Runner.set_row`.

  Raises:
    ValueError: More of something than the state has room for.
  """
  if len(bias_ids) != len(bias):
    raise ValueError(f'{len(bias)} biases for {len(bias_ids)} tokens')
  given = dict(tokens=tokens, bias=bias, stop_ids=stop_ids)
  room = (sizes.max_seq_len, sizes.max_logit_bias, sizes.max_stop_ids)
  for (name, values), most in zip(given.items(), room, strict=True):
    if len(values) > most:
      raise ValueError(f'{len(values)} {name} in a row with room for {most}')
  if mask is not None and np.shape(mask) != (sizes.num_words,):
    raise ValueError(
      f'a mask of {sizes.vocab_size} tokens has {sizes.num_words} words, got '
      f'shape {np.shape(mask)}'
    )
  parts = {
    name: np.full(shape, -1, np.int32)
    for name, shape in sizes.row_shapes.items()
  }
  parts['row'][()] = row
  parts['history'][: len(tokens)] = tokens
  parts['bias_ids'][: len(bias)] = bias_ids
  parts['bias'].view(np.float32)[: len(bias)] = bias
  parts['stop_ids'][: len(stop_ids)] = stop_ids
  if mask is not None:
    parts['mask'].view(np.uint32)[:] = mask
  return np.concatenate([x.ravel() for x in parts.values()])


def set_row(
  sizes: RowSizes, state: RowState, buffer: Int[Array, 'X']
) -> RowState:
  """Replaces everything that the state has of one row."""
  parts, end = {}, 0
  for name, shape in sizes.row_shapes.items():
    start, end = end, end + math.prod(shape)
    parts[name] = buffer[start:end].reshape(shape)
  row = parts.pop('row')

  def put(old, new):
    return old.at[row].set(jax.lax.bitcast_convert_type(new, old.dtype))

  return RowState(**{k: put(getattr(state, k), v) for k, v in parts.items()})


def set_masks(
  state: RowState, rows: Int[Array, 'G'], masks: UInt32[Array, 'G W']
) -> RowState:
  """Replaces the masks of some rows; rows past the last are dropped."""
  mask = state.mask.at[rows].set(masks, mode='drop')
  return dataclasses.replace(state, mask=mask)
