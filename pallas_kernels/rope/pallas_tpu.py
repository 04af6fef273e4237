"""rope on a TPU, from the layout of projections to that of attention.

Attention kernels want a head's tokens together, projections write a token's
heads together. XLA rotates in one pass of its own (two, as it pads the halves)
and turns in another; here one pass reads the one and writes the other, and the
gradient goes the way back. The transposition that is left in the result is no
operation where attention transposes it back.

Half a head is rolled along the lanes, so heads are multiples of 128 wide.

Cost: 2 B T N H elements of HBM and the tables. VMEM: two blocks of each.
"""

from collections.abc import Mapping
import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.common import chip as chip_lib
from pallas_kernels.common import varying
from pallas_kernels.rope.gradient import differentiable

_LANES = 128
_ROWS = 32
_UNROLL = 8
_BLOCK_BYTES = 2**20


def rope(
  x: jax.Array,
  sin: jax.Array,
  cos: jax.Array,
  *,
  config: Mapping[str, int] | None = None,
) -> jax.Array:
  """See `api.rope`."""
  return differentiable(
    functools.partial(rope_forward, config=config),
    functools.partial(rope_backward, config=config),
    x,
    sin,
    cos,
  )


def rope_forward(
  x: jax.Array,
  sin: jax.Array,
  cos: jax.Array,
  *,
  config: Mapping[str, int] | None = None,
) -> jax.Array:
  """The rotation."""
  b, t, n, h = x.shape
  heads = _call(
    x.reshape(b, t, n * h), sin, cos, n, True, config, 'rope_forward'
  )
  return heads.transpose(0, 2, 1, 3)


def rope_backward(
  d_out: jax.Array,
  sin: jax.Array,
  cos: jax.Array,
  *,
  config: Mapping[str, int] | None = None,
) -> jax.Array:
  """The rotation back."""
  b, t, n, h = d_out.shape
  heads = d_out.transpose(0, 2, 1, 3)
  tokens = _call(heads, -sin, cos, n, False, config, 'rope_backward')
  return tokens.reshape(b, t, n, h)


def _call(x, sin, cos, num_heads, to_heads, config, name):
  b, t = x.shape[0], x.shape[1 if to_heads else 2]
  h = 2 * sin.shape[-1]
  if h % _LANES:
    raise NotImplementedError(f'heads of {h} are not a multiple of {_LANES}')
  x, sin, cos = varying.vary_alike(x, sin, cos)
  row_bytes = num_heads * h * x.dtype.itemsize
  most = (config or {}).get('block_rows', _BLOCK_BYTES // row_bytes)
  block_rows = max(-(-min(most, t) // _ROWS) * _ROWS, _ROWS)
  by_token = pl.BlockSpec(
    (None, block_rows, num_heads * h), lambda b, i: (b, i, 0)
  )
  by_head = pl.BlockSpec(
    (None, num_heads, block_rows, h), lambda b, i: (b, 0, i, 0)
  )
  own = sin.shape[0] > 1
  table = pl.BlockSpec(
    (None, block_rows, h), lambda b, i: (b if own else 0, i, 0)
  )
  shape = (b, num_heads, t, h) if to_heads else (b, t, num_heads * h)
  return pl.pallas_call(
    functools.partial(_rope_kernel, to_heads=to_heads, num_heads=num_heads),
    grid=(b, pl.cdiv(t, block_rows)),
    in_specs=[by_token if to_heads else by_head, table, table],
    out_specs=by_head if to_heads else by_token,
    out_shape=varying.shape(shape, x.dtype, x),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel'),
      vmem_limit_bytes=chip_lib.current().vmem_bytes,
    ),
    name=name,
  )(x, jnp.concatenate([-sin, sin], -1), jnp.concatenate([cos, cos], -1))


def _rope_kernel(x_ref, sin_ref, cos_ref, out_ref, *, to_heads, num_heads):
  block_rows, width = sin_ref.shape

  def rotate(r, _):
    rows = pl.ds(pl.multiple_of(r * _ROWS, _ROWS), _ROWS)
    sin, cos = sin_ref[rows, :], cos_ref[rows, :]

    def head(n, _):
      columns = pl.ds(pl.multiple_of(n * width, width), width)
      x = x_ref[(rows, columns) if to_heads else (n, rows)].astype(jnp.float32)
      x = x * cos + pltpu.roll(x, width // 2, 1) * sin
      out_ref[(n, rows) if to_heads else (rows, columns)] = x.astype(
        out_ref.dtype
      )
      return 0

    jax.lax.fori_loop(
      0, num_heads, head, 0, unroll=math.gcd(_UNROLL, num_heads)
    )
    return 0

  jax.lax.fori_loop(0, block_rows // _ROWS, rotate, 0)
