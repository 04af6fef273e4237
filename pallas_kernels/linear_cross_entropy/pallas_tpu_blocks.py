"""Block sizes of the TPU kernels: tuned, made to fit the input and VMEM."""

from collections.abc import Mapping
from typing import Any

import jax

from pallas_kernels.common import chip as chip_lib
from pallas_kernels.common import tuned

LANES = 128
_OP = 'linear_cross_entropy'
_MOST_VOCAB = 1024
# Where nothing is tuned. Chunks are as long as the head's passage takes to hide
# behind products; where two cores work as one, there are two blocks for them.
_DEFAULTS = {
  'v4': dict(chunk=1024, block_tokens=512, block_vocab=256, block_width=1024),
  'v5e': dict(chunk=1024, block_tokens=1024, block_width=4096),
  'v5p': dict(chunk=2048, block_tokens=1024, block_width=2048),
  'v6e': dict(chunk=2048, block_tokens=1024, block_width=4096, rows=512),
  'tpu7x': dict(chunk=2048, block_tokens=1024, block_width=2048, rows=512),
}
_BLOCK_VOCAB = 512
_ROWS = 256


def features(x: jax.Array, head: jax.Array) -> dict[str, Any]:
  """What describes an input, as in tuned.json."""
  return dict(
    width=head.shape[0],
    vocab=head.shape[1],
    tokens=x.size // x.shape[-1],
    dtype=x.dtype.name,
  )


def candidates(
  chip: str, x: jax.Array, head: jax.Array
) -> list[dict[str, int]]:
  """Configurations to try."""
  base = _defaults(chip)
  tried = [
    base | dict(chunk=chunk, block_vocab=block_vocab, rows=rows)
    for chunk in (base['chunk'] // 2, base['chunk'], base['chunk'] * 2)
    for block_vocab in (256, 512, 768)
    for rows in (256, 512)
  ]
  fit = lambda config: blocks(x, head, None, config, True, chip)
  return [c for c in tried if fit(c)['block_vocab'] == c['block_vocab']]


def blocks(
  x: jax.Array,
  head: jax.Array,
  chunk: int | None,
  config: Mapping[str, int] | None,
  keep: bool,
  chip_name: str | None = None,
) -> dict[str, int]:
  """Block sizes.

  Args:
    x: `[..., D]`.
    head: `[D, V]`.
    chunk: Tokens whose exponentials may exist at a time.
    config: Instead of what is tuned.
    keep: Whether there are chunks, or statistics of all tokens only.
    chip_name: Instead of the chip that is traced for.

  Returns:
    'chunk', the tokens of one, a multiple of 'block_tokens'; the block sizes of
    the two kernels; and 'vmem_bytes'.
  """
  chip = chip_lib.current()
  name = chip_name or chip.name
  if config is None:
    config = tuned.lookup(
      _OP, name, features(x, head), function=f'{_OP}_gradients'
    )
  sizes = _defaults(name) | dict(config)
  num_tokens = x.size // x.shape[-1]
  width = -(-x.shape[-1] // LANES) * LANES
  block_vocab = min(sizes['block_vocab'], _round_up(head.shape[1]), _MOST_VOCAB)
  itemsize = x.dtype.itemsize

  most = min(chunk or sizes['chunk'], num_tokens) if keep else num_tokens
  even = _round_up(-(-num_tokens // -(-num_tokens // most)))
  block_tokens = min(sizes['block_tokens'], even)
  block_width = _divisor(width, sizes['block_width'])
  forward = lambda: _forward_bytes(block_tokens, block_vocab, width, itemsize)
  while forward() > chip.vmem_bytes and block_tokens > 2 * LANES:
    block_tokens = _round_up(block_tokens // 2)
  while forward() > chip.vmem_bytes and block_vocab > LANES:
    block_vocab = _round_up(block_vocab // 2)
  chunk = _round_up(even, block_tokens)
  backward = lambda: _backward_bytes(chunk, block_vocab, block_width, itemsize)
  while keep and backward() > chip.vmem_bytes and block_width > LANES:
    block_width = _divisor(width, block_width - LANES)
  return dict(
    chunk=chunk,
    block_tokens=block_tokens,
    block_vocab=block_vocab,
    block_width=block_width,
    rows=_divisor(block_tokens, sizes['rows']),
    d_rows=_divisor(block_width, sizes['rows']),
    vmem_bytes=chip.vmem_bytes,
  )


def _defaults(chip):
  return dict(block_vocab=_BLOCK_VOCAB, rows=_ROWS) | _DEFAULTS[chip]


def _forward_bytes(block_tokens, block_vocab, width, itemsize):
  tile = block_tokens * block_vocab
  x_and_head = (block_tokens + 2 * block_vocab) * width * itemsize
  return x_and_head + tile * (2 * 4 + 2 * itemsize)


def _backward_bytes(chunk, block_vocab, block_width, itemsize):
  x = block_width * chunk * (itemsize + 4)
  # And sums of at most 512 rows, twice.
  head = (block_width * (2 * itemsize + 4 * 4) + 4 * 1024) * block_vocab
  return x + head + 3 * chunk * block_vocab * itemsize + 2 * 8 * 4 * chunk


def _round_up(size, multiple=LANES):
  return -(-size // multiple) * multiple


def _divisor(size, most):
  """Largest multiple of the lanes that divides `size`, at most `most`."""
  return max(
    n for n in range(LANES, max(most, LANES) + 1, LANES) if size % n == 0
  )
