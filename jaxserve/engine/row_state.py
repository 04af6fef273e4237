"""What the device keeps of the engine's rows between steps, and how it changes.

Two arrays, as every array that a program is given costs the host some
microseconds: the history, which steps write, and the words of everything else,
which they read only where a row uses it.

Letters: S rows, M longest sequence, C biased tokens, E stop tokens, V vocab,
W = ceil(V / 32) words of a mask, X = 2C + E + W, T tokens, G masks set at once.
"""

from collections.abc import Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32
import numpy as np

from jaxserve.samplers.base import RowState

ALL_ALLOWED = np.uint32(0xFFFFFFFF)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowStore:
  """A `RowState`, as it is kept."""

  history: Int[Array, 'S M']
  words: Int[Array, 'S X']


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
  def num_mask_words(self) -> int:
    """W."""
    return -(-self.vocab_size // 32)

  @functools.cached_property
  def columns(self) -> dict[str, slice]:
    """Where each field lies in `RowStore.words`."""
    widths = dict(
      bias_ids=self.max_logit_bias,
      bias=self.max_logit_bias,
      stop_ids=self.max_stop_ids,
      mask=self.num_mask_words,
    )
    columns, end = {}, 0
    for name, width in widths.items():
      columns[name] = slice(end, end + width)
      end += width
    return columns

  @property
  def num_words(self) -> int:
    """X."""
    return self.columns['mask'].stop

  @property
  def row_size(self) -> int:
    """Length of the buffer of `set_row`."""
    return 1 + self.max_seq_len + self.num_words


def allocate(
  sizes: RowSizes, sharding: jax.sharding.Sharding | None = None
) -> RowStore:
  """Rows of which nothing is known."""
  row = pack_row(sizes, 0)[1:]

  def make():
    rows = jnp.tile(row, (sizes.num_rows, 1))
    return RowStore(*jnp.split(rows, [sizes.max_seq_len], axis=1))

  return jax.jit(make, out_shardings=sharding)()


def unpack(sizes: RowSizes, store: RowStore) -> RowState:
  """What samplers read."""
  bits = dict(bias=jnp.float32, mask=jnp.uint32)
  fields = {
    name: jax.lax.bitcast_convert_type(
      store.words[:, columns], bits.get(name, jnp.int32)
    )
    for name, columns in sizes.columns.items()
  }
  return RowState(history=store.history, **fields)


def record(
  history: Int[Array, 'S M'],
  row: Int[Array, 'T'],
  position: Int[Array, 'T'],
  token: Int[Array, 'T'],
) -> Int[Array, 'S M']:
  """Enters tokens; rows past the last are dropped."""
  return history.at[row, position].set(token, mode='drop')


def pack_row(
  sizes: RowSizes,
  row: int,
  *,
  tokens: Sequence[int] = (),
  bias_ids: Sequence[int] = (),
  bias: Sequence[float] = (),
  stop_ids: Sequence[int] = (),
  mask: UInt32[np.ndarray, 'W'] | None = None,
) -> Int[np.ndarray, 'Y']:
  """The buffer of `set_row`: the row, its history, its words.

  Raises:
    ValueError: More of something than there is room for.
  """
  if len(bias_ids) != len(bias):
    raise ValueError(f'{len(bias)} biases for {len(bias_ids)} tokens')
  given = dict(tokens=tokens, bias=bias, stop_ids=stop_ids)
  room = (sizes.max_seq_len, sizes.max_logit_bias, sizes.max_stop_ids)
  for (name, values), most in zip(given.items(), room, strict=True):
    if len(values) > most:
      raise ValueError(f'{len(values)} {name} in a row with room for {most}')
  if mask is not None and np.shape(mask) != (sizes.num_mask_words,):
    raise ValueError(
      f'a mask of {sizes.vocab_size} tokens has {sizes.num_mask_words} words, '
      f'got shape {np.shape(mask)}'
    )
  buffer = np.full(sizes.row_size, -1, np.int32)
  buffer[0] = row
  buffer[1 : 1 + len(tokens)] = tokens
  words = buffer[1 + sizes.max_seq_len :]
  part = {name: words[columns] for name, columns in sizes.columns.items()}
  part['bias_ids'][: len(bias)] = bias_ids
  part['bias'].view(np.float32)[: len(bias)] = bias
  part['stop_ids'][: len(stop_ids)] = stop_ids
  part['mask'].view(np.uint32)[:] = ALL_ALLOWED if mask is None else mask
  return buffer


def set_row(
  sizes: RowSizes, store: RowStore, buffer: Int[Array, 'Y']
) -> RowStore:
  """Replaces everything that is kept of one row."""
  row, rest = buffer[0], buffer[1:]
  history, words = jnp.split(rest, [sizes.max_seq_len])
  return RowStore(
    store.history.at[row].set(history), store.words.at[row].set(words)
  )


def pack_masks(
  sizes: RowSizes, width: int, rows: Sequence[int], masks: np.ndarray
) -> Int[np.ndarray, 'G Y']:
  """The buffer of `set_masks`: a mask a line, and its row in the end."""
  buffer = np.full((width, sizes.num_mask_words + 1), sizes.num_rows, np.int32)
  buffer[: len(rows), :-1] = masks.view(np.int32)
  buffer[: len(rows), -1] = rows
  return buffer


def set_masks(
  sizes: RowSizes, words: Int[Array, 'S X'], buffer: Int[Array, 'G Y']
) -> Int[Array, 'S X']:
  """Replaces the masks of some rows; rows past the last are dropped."""
  at = words.at[buffer[:, -1], sizes.columns['mask']]
  return at.set(buffer[:, :-1], mode='drop')
