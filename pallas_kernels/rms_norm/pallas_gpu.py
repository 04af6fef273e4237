"""rms_norm on a Hopper GPU: each row once through shared memory.

A block is one warpgroup. TMA keeps a ring of tiles of rows ahead of it; the
result takes the place of its input in shared memory and leaves by TMA, and the
place is filled again. Rows of up to `_NARROW` columns lie along the lanes of a
warp, several in a tile, and are summed by shuffles; longer ones lie along the
warpgroup and are summed through shared memory. The gradient of scale stays in
registers while the rows pass, and XLA sums one row per block.

Rows that are no multiple of what a warp or the warpgroup reads are padded, a
pass over HBM more on each side: 32 columns up to `_NARROW`, 256 above.

Cost: forward 2 T D elements of HBM, 4 T D with a residual; backward 3 T D, 4 T
D with the gradient of the sum, and 4 D bytes per block twice.
"""

from collections.abc import Mapping
import functools
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.common import hopper
from pallas_kernels.common import tuned
from pallas_kernels.common import varying
from pallas_kernels.rms_norm.features import features
from pallas_kernels.rms_norm.gradient import differentiable

# Columns of a row that a warp takes whole. TMA takes as many in one dimension:
# longer rows are [D / 256, 256].
_NARROW = 256
_WARPS, _LANES = 4, 32
_MAX_WIDTH, _MAX_BACKWARD_WIDTH = 32768, 8192
# Rows in a tile of narrow rows: of 4, one per warp, there are many.
_NARROW_ROWS, _NARROW_TILE = (32, 16, 8, 4), 2048
# Elements of a long row in registers at a time, and of a gain that stays there.
_PIECE, _KEPT_GAIN = 2048, 4096
_STAGES = 4
# Of a block's shared memory, for barriers and sums of the warps.
_RESERVED = 4096
# As many as have registers; backward, those of the gradient of scale.
_BLOCKS_PER_SM, _BACKWARD_BLOCKS_PER_SM, _LONG_BACKWARD_BLOCKS_PER_SM = 4, 3, 2
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def rms_norm(
  x: jax.Array,
  scale: jax.Array,
  residual: jax.Array | None = None,
  **kwargs: Any,
) -> Any:
  """See `api.rms_norm`."""
  return differentiable(
    functools.partial(rms_norm_forward, **kwargs),
    functools.partial(rms_norm_backward, **kwargs),
    x,
    scale,
    residual,
  )


def candidates(chip, x, scale, *args, **kwargs) -> list[dict[str, int]]:
  """Configurations for the tuner to try."""
  del chip, x, scale, args, kwargs
  return [
    dict(stages=stages, blocks_per_sm=blocks)
    for stages in (2, 3, 4, 6)
    for blocks in (2, 4, 6, 8)
  ]


backward_features = features
backward_candidates = candidates


def rms_norm_forward(
  x: jax.Array,
  scale: jax.Array,
  residual: jax.Array | None,
  *,
  epsilon: float = 1e-6,
  plus_one: bool = False,
  config: Mapping[str, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The norm, and the sum that it is of.

  Raises:
    NotImplementedError: A dtype or a width that the kernel does not take.
  """
  x, scale, residual = varying.vary_alike(x, scale, residual)
  num_arrays = 1 + (residual is not None)
  plan = _Plan('rms_norm_forward', x, num_arrays, config, _BLOCKS_PER_SM)
  arrays = [plan.cut(a) for a in (x, residual) if a is not None]
  outputs = hopper.kernel(
    functools.partial(_forward_kernel, plan, epsilon),
    name='rms_norm_forward',
    out=[varying.shape(arrays[0].shape, x.dtype, x)] * len(arrays),
    grid=dict(block=plan.num_blocks),
    scratch=plan.scratch,
    # The root is to be a float32's.
    approx_math=False,
  )(plan.gain(scale, plus_one), *arrays)
  outputs = [plan.join(a) for a in outputs]
  return outputs[0], x if residual is None else outputs[1]


def rms_norm_backward(
  total: jax.Array,
  scale: jax.Array,
  d_norm: jax.Array,
  d_total: jax.Array | None,
  *,
  epsilon: float = 1e-6,
  plus_one: bool = False,
  config: Mapping[str, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Gradients of the sum and of scale.

  Raises:
    NotImplementedError: A dtype or a width that the kernel does not take.
  """
  total, scale, d_norm, d_total = varying.vary_alike(
    total, scale, d_norm, d_total
  )
  width = total.shape[-1]
  if width > _MAX_BACKWARD_WIDTH:
    raise NotImplementedError(
      f'{width} columns of the gradient of scale do not fit the registers of a '
      f'warpgroup; {_MAX_BACKWARD_WIDTH} do'
    )
  num_arrays = 2 + (d_total is not None)
  blocks_per_sm = (
    _BACKWARD_BLOCKS_PER_SM
    if width <= _KEPT_GAIN
    else _LONG_BACKWARD_BLOCKS_PER_SM
  )
  plan = _Plan('rms_norm_backward', total, num_arrays, config, blocks_per_sm)
  arrays = [plan.cut(a) for a in (total, d_norm, d_total) if a is not None]
  d_h, d_scale = hopper.kernel(
    functools.partial(_backward_kernel, plan, epsilon),
    name='rms_norm_backward',
    out=[
      varying.shape(arrays[0].shape, total.dtype, total),
      varying.shape((plan.num_blocks, *plan.tile), jnp.float32, total),
    ],
    grid=dict(block=plan.num_blocks),
    scratch=plan.scratch,
    approx_math=False,
  )(plan.gain(scale, plus_one), *arrays)
  # A narrow tile has all columns in each row; a long row is one tile.
  d_scale = d_scale.reshape(-1, plan.padded).sum(0)[:width]
  return plan.join(d_h), d_scale.astype(scale.dtype)


class _Plan:
  """How rows are cut into tiles, and tiles dealt out to blocks.

  Attributes:
    width: Columns of a row.
    padded: The same, rounded up to what a tile takes.
    tile: `[rows, padded]` of a narrow tile; `[padded / 256, 256]` of one row.
    num_tiles: Of an array.
    stages: Tiles of each array in shared memory.
    num_blocks: Blocks; block b has the tiles b, b + num_blocks, ...
    layout: Of narrow tiles in registers: a row in each warp. `None` for others.
  """

  def __init__(self, function, x, num_arrays, config, blocks_per_sm):
    gpu = hopper.current()
    if x.dtype not in _DTYPES:
      raise NotImplementedError(f'{x.dtype.name} is not a float of 16 or 32')
    if x.shape[-1] > _MAX_WIDTH or not x.size:
      raise NotImplementedError(
        f'x {x.shape} must have 1 to {_MAX_WIDTH} columns, and rows'
      )
    if config is None:
      config = tuned.lookup(
        'rms_norm', gpu.name, features(x, None), function=function
      )
    self._shape, self.width = x.shape, x.shape[-1]
    self._num_rows = x.size // self.width
    self._cut_rows()
    self.num_tiles = self._num_rows * self.padded // math.prod(self.tile)
    tile_bytes = math.prod(self.tile) * x.dtype.itemsize * num_arrays
    blocks_per_sm = config.get('blocks_per_sm', blocks_per_sm)
    fit = (gpu.smem_bytes // blocks_per_sm - _RESERVED) // tile_bytes
    self.stages = max(2, min(config.get('stages', _STAGES), fit))
    self.num_blocks = min(gpu.num_sms * blocks_per_sm, self.num_tiles)
    if self.stages * tile_bytes + _RESERVED > gpu.smem_bytes:
      raise NotImplementedError(
        f'two tiles of {tile_bytes} bytes exceed {gpu.smem_bytes} of an SM'
      )
    ring = plgpu.SMEM((self.stages, *self.tile), x.dtype)
    self.scratch = dict(
      rings=[ring] * num_arrays,
      full=plgpu.Barrier(num_arrivals=num_arrays, num_barriers=self.stages),
    )
    if self.layout:
      # Only from shared memory can lanes of every warp read the same.
      self.scratch |= dict(
        gain=plgpu.SMEM((self.padded,), jnp.float32), gain_full=plgpu.Barrier()
      )

  def _cut_rows(self):
    """Into narrow tiles, or tiles of a long row."""
    self.padded = -(-self.width // _LANES) * _LANES
    rows = [
      n
      for n in _NARROW_ROWS
      if self._num_rows % n == 0 and n * self.padded <= _NARROW_TILE
    ]
    if self.width <= _NARROW and rows:
      self.tile = rows[0], self.padded
      # The gain is float32: 16 bytes at a time.
      vector = math.gcd(self.padded // _LANES, 4)
      self.layout = plgpu.Layout.TILED(
        plgpu.Tiling(((_WARPS, _LANES * vector), (vector,))),
        warp_dims=(-3,),
        lane_dims=(-2,),
        vector_dim=-1,
      )
    else:
      self.padded = -(-self.width // _NARROW) * _NARROW
      self.tile = self.padded // _NARROW, _NARROW
      self.layout = None

  def cut(self, a):
    """[..., D] to the tiles below each other."""
    a = jnp.pad(
      a.reshape(-1, self.width), ((0, 0), (0, self.padded - self.width))
    )
    return a.reshape(-1, self.tile[1])

  def join(self, a):
    """Inverse of `cut`."""
    return a.reshape(-1, self.padded)[:, : self.width].reshape(self._shape)

  def gain(self, scale, plus_one):
    """Of one row, float32, as tiles are cut."""
    gain = scale.astype(jnp.float32) + (1.0 if plus_one else 0.0)
    gain = jnp.pad(gain, (0, self.padded - self.width))
    return gain if self.layout else gain.reshape(self.tile)

  def pieces(self):
    """Parts of a tile that are in registers at a time."""
    rows = self.tile[0]
    if not self.layout:
      rows = math.gcd(rows, _PIECE // _NARROW)
    return [slice(r, r + rows) for r in range(0, self.tile[0], rows)]

  def load(self, ref):
    """A piece of a tile as float32."""
    a = ref[...]
    if self.layout:
      a = plgpu.layout_cast(a, self.layout)
    return a.astype(jnp.float32)

  def gain_of(self, gain_ref, gain=None, gain_full=None):
    """A function of a piece that returns its gain."""
    if self.layout:
      plgpu.copy_gmem_to_smem(gain_ref, gain, gain_full)
      plgpu.barrier_wait(gain_full)
      gain = plgpu.layout_cast(gain[...], self.layout.reduce(0))
      gain = plgpu.layout_cast(
        jax.lax.broadcast_in_dim(gain, self.tile, (1,)), self.layout
      )
      return lambda piece: gain
    if self.padded > _KEPT_GAIN:
      return lambda piece: gain_ref[piece]
    gains = {p.start: gain_ref[p] for p in self.pieces()}
    return lambda piece: gains[piece.start]

  def mean(self, a):
    """Mean along the rows of a piece, as large as the piece or a scalar."""
    if not self.layout:
      return jnp.sum(a) * (1 / self.width)
    mean = jnp.sum(a, axis=1) * (1 / self.width)
    return jax.lax.broadcast_in_dim(mean, a.shape, (0,))


def _for_each_tile(plan, inputs, outputs, rings, full, body, init=None):
  """Folds `body(refs of the tiles, carry)` over a block's tiles.

  What it leaves in the first tiles is copied to `outputs`.
  """
  block = jax.lax.axis_index('block')
  count = (plan.num_tiles - block + plan.num_blocks - 1) // plan.num_blocks
  rows = plan.tile[0]

  def place(i):
    start = (block + i * plan.num_blocks) * rows
    return pl.ds(pl.multiple_of(start, rows), rows)

  def fetch(i):
    slot = jax.lax.rem(i, plan.stages)
    for ref, ring in zip(inputs, rings, strict=True):
      plgpu.copy_gmem_to_smem(ref.at[place(i)], ring.at[slot], full.at[slot])

  for i in range(plan.stages):
    pl.when(i < count)(functools.partial(fetch, jnp.int32(i)))

  def step(i, carry):
    slot = jax.lax.rem(i, plan.stages)
    plgpu.barrier_wait(full.at[slot])
    carry = body([ring.at[slot] for ring in rings], carry)
    plgpu.commit_smem()
    last = len(outputs) - 1
    for k, ref in enumerate(outputs):
      plgpu.copy_smem_to_gmem(
        rings[k].at[slot], ref.at[place(i)], commit_group=k == last
      )
    # The tile before has left by now, and another may take its place.
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    after = i - 1 + plan.stages
    pl.when((i > 0) & (after < count))(functools.partial(fetch, after))
    return carry

  carry = jax.lax.fori_loop(0, count, step, init)
  plgpu.wait_smem_to_gmem(0)
  return carry


def _forward_kernel(plan, epsilon, gain_ref, *refs, rings, full, **gain):
  inputs, outputs = refs[: len(rings)], refs[len(rings) :]
  gain_of = plan.gain_of(gain_ref, **gain)
  pieces = plan.pieces()

  def normalise(tiles, carry):
    square = None
    for piece in pieces:
      h = plan.load(tiles[0].at[piece])
      if len(tiles) > 1:
        total = (h + plan.load(tiles[1].at[piece])).astype(tiles[1].dtype)
        tiles[1][piece] = total
        h = total.astype(jnp.float32)
      square = h * h if square is None else square + h * h
    inverse = jax.lax.rsqrt(plan.mean(square) + epsilon)
    for piece in pieces:
      h = plan.load(tiles[-1].at[piece])
      norm = h * inverse * gain_of(piece)
      tiles[0][piece] = norm.astype(tiles[0].dtype)
    return carry

  _for_each_tile(plan, inputs, outputs, rings, full, normalise)


def _backward_kernel(plan, epsilon, gain_ref, *refs, rings, full, **gain):
  *inputs, d_h_ref, d_scale_ref = refs
  gain_of = plan.gain_of(gain_ref, **gain)
  pieces = plan.pieces()

  def differentiate(tiles, d_scales):
    square, along = None, None
    for piece in pieces:
      h, d_norm = (plan.load(t.at[piece]) for t in tiles[:2])
      terms = h * h, d_norm * gain_of(piece) * h
      square = terms[0] if square is None else square + terms[0]
      along = terms[1] if along is None else along + terms[1]
    inverse = jax.lax.rsqrt(plan.mean(square) + epsilon)
    along = plan.mean(along) * inverse
    sums = []
    for piece, d_scale in zip(pieces, d_scales, strict=True):
      h, d_norm = (plan.load(t.at[piece]) for t in tiles[:2])
      unit = h * inverse
      d_h = inverse * (d_norm * gain_of(piece) - unit * along)
      for more in tiles[2:]:
        d_h = d_h + plan.load(more.at[piece])
      tiles[0][piece] = d_h.astype(tiles[0].dtype)
      sums.append(d_scale + d_norm * unit)
    return tuple(sums)

  def zeros(piece):
    shape = piece.stop - piece.start, plan.tile[1]
    a = jnp.zeros(shape, jnp.float32)
    if plan.layout:
      return plgpu.layout_cast(a, plan.layout)
    vector = min(4, math.prod(shape) // hopper.WARPGROUP)
    return plgpu.layout_cast(a, plgpu.Layout.WG_STRIDED(shape, vector))

  d_scales = _for_each_tile(
    *(plan, inputs, [d_h_ref], rings, full, differentiate),
    tuple(zeros(piece) for piece in pieces),
  )
  block = jax.lax.axis_index('block')
  for piece, d_scale in zip(pieces, d_scales, strict=True):
    d_scale_ref[block, piece] = d_scale
