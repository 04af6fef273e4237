"""What `tune_gpu` finds block sizes for, the most important first.

A row is one function of an op at the shapes of a model, as the kernel is called
by the op or by its derivative.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common import dispatch
from pallas_kernels.quantized_matmul import quantize_weights
from pallas_kernels.ragged_paged_attention.cases import quantize

_BF16 = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Row:
  """One piece of work.

  Attributes:
    op: Name of its folder.
    function: Of the op's modules.
    make: Its arguments from a key; traceable.
    static: Its keyword arguments.
    tolerance: Of the relative RMS error of a candidate.
  """

  op: str
  function: str
  make: Callable[[jax.Array], tuple[Any, ...]]
  static: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  tolerance: float = 2e-2

  def expected(self, args: tuple[Any, ...]) -> Any:
    """What XLA's implementation makes of the same values in float32."""
    widen = lambda a: a.astype(jnp.float32) if a.dtype == _BF16 else a
    f = dispatch.load(self.op, 'xla', self.function)
    with jax.default_matmul_precision('highest'):
      wide = jax.tree.map(widen, args)
      return jax.jit(functools.partial(f, **self.static))(*wide)


def _normal(key, *shape, scale=1.0):
  return (jax.random.normal(key, shape) * scale).astype(_BF16)


def _qkv(key, length, head_dim, batch=1, heads=32, kv_heads=8):
  sizes = (heads, kv_heads, kv_heads)
  return tuple(
    _normal(k, batch, length, n, head_dim)
    for k, n in zip(jax.random.split(key, 3), sizes, strict=True)
  )


def _attention(length, head_dim, **sizes):
  def make(key):
    return *_qkv(key, length, head_dim, **sizes), *(None,) * 5

  static = dict(scale=head_dim**-0.5, soft_cap=None)
  return Row('flash_attention', 'flash_attention_forward', make, static)


def _attention_backward(length, head_dim, **sizes):
  static = dict(scale=head_dim**-0.5, soft_cap=None)

  def make(key):
    key, other = jax.random.split(key)
    args = *_qkv(key, length, head_dim, **sizes), *(None,) * 5
    f = dispatch.load('flash_attention', 'xla', 'flash_attention_forward')
    out, lse = f(*args, **static)
    d_out = jax.random.normal(other, out.shape, _BF16)
    return *args, out.astype(_BF16), lse, d_out, None

  return Row('flash_attention', 'flash_attention_backward', make, static)


def _decode(page_size, dtype, sequences=64, length=4096, heads=32, kv_heads=8):
  head_dim = 128

  def make(key):
    keys = jax.random.split(key, 3)
    pages = length // page_size
    order = np.random.default_rng(0).permutation(sequences * pages)
    table = jnp.asarray(order.reshape(sequences, pages), jnp.int32)
    shape = (1, sequences * pages, kv_heads, page_size, head_dim)
    pools = [_normal(k, *shape) for k in keys[:2]]
    scales = (None, None)
    if dtype != 'bfloat16':
      pools, scales = zip(*(quantize(x, dtype) for x in pools), strict=True)
    start = jnp.arange(sequences + 1, dtype=jnp.int32)
    kv_len = jnp.full(sequences, length, jnp.int32)
    q = _normal(keys[2], sequences, heads, head_dim)
    rest = jnp.int32(0), start, kv_len, table, None, None, *scales, None, None
    return q, *pools, *rest

  static = dict(scale=head_dim**-0.5, soft_cap=None)
  return Row('ragged_paged_attention', 'ragged_paged_attention', make, static)


def _grouped(m, k, n, experts, backward=False):
  def make(key):
    keys = jax.random.split(key, 3)
    sizes = jnp.full(experts, m // experts, jnp.int32)
    lhs = _normal(keys[0], m, k)
    rhs = _normal(keys[1], experts, k, n, scale=k**-0.5)
    args = lhs, rhs, sizes, None
    return (*args, _normal(keys[2], m, n)) if backward else args

  function = 'backward' if backward else 'forward'
  return Row('grouped_matmul', f'grouped_matmul_{function}', make)


def _quantized(m, dtype, activations=None, k=4096, n=14336):
  def make(key):
    keys = jax.random.split(key)
    matrix = jax.random.normal(keys[1], (k, n)) * k**-0.5
    return _normal(keys[0], m, k), *quantize_weights(matrix, dtype), None

  static = dict(activations=activations)
  return Row('quantized_matmul', 'quantized_matmul', make, static)


def _loss(tokens=8192, width=4096, vocab=128256):
  def make(key):
    keys = jax.random.split(key, 3)
    x = _normal(keys[0], 1, tokens, width)
    head = _normal(keys[1], width, vocab, scale=width**-0.5)
    targets = jax.random.randint(keys[2], (1, tokens), 0, vocab)
    return x, head, targets, jnp.ones((1, tokens), jnp.float32)

  function = 'linear_cross_entropy_gradients'
  return Row('linear_cross_entropy', function, make)


def _norm(rows, width, backward=False):
  def make(key):
    keys = jax.random.split(key, 3)
    x, other = (_normal(k, rows, width) for k in keys[:2])
    scale = 1 + _normal(keys[2], width, scale=0.1)
    return (x, scale, other, None) if backward else (x, scale, None)

  return Row(
    'rms_norm', f'rms_norm_{"backward" if backward else "forward"}', make
  )


_F8 = 'float8_e4m3fn'
ROWS: dict[str, Row] = {
  'attention 4096, head dim 128': _attention(4096, 128, batch=4),
  'attention backward 4096, head dim 128': _attention_backward(
    4096, 128, batch=4
  ),
  'paged decode, page 64': _decode(64, 'bfloat16'),
  'paged decode, page 64, float8': _decode(64, _F8),
  'paged decode, page 16': _decode(16, 'bfloat16'),
  'experts 32768 x 2048 x 1536, 128': _grouped(32768, 2048, 1536, 128),
  'W8A8 16 x 4096 x 14336': _quantized(16, _F8, _F8),
  'W4A16 16 x 4096 x 14336': _quantized(16, 'int4'),
  'attention 16384, head dim 128': _attention(16384, 128),
  'attention backward 16384, head dim 128': _attention_backward(16384, 128),
  'W8A8 4096 x 4096 x 14336': _quantized(4096, _F8, _F8),
  'W4A16 4096 x 4096 x 14336': _quantized(4096, 'int4'),
  'experts 512 x 2048 x 1536, 128': _grouped(512, 2048, 1536, 128),
  'experts backward 32768 x 2048 x 1536, 128': _grouped(
    32768, 2048, 1536, 128, backward=True
  ),
  'paged decode, page 128': _decode(128, 'bfloat16'),
  'norm 8192 x 4096': _norm(8192, 4096),
  'norm backward 8192 x 4096': _norm(8192, 4096, backward=True),
  'norm 262144 x 128': _norm(262144, 128),
  'attention 1024, head dim 128': _attention(1024, 128, batch=4),
  'attention 4096, head dim 64': _attention(4096, 64, batch=4),
  'attention 4096, head dim 256': _attention(4096, 256, batch=4),
  'loss 8192 x 4096 x 128256': _loss(),
}
# For a try on any machine.
TINY: dict[str, Row] = {
  'tiny attention, head dim 64': _attention(256, 64, heads=2, kv_heads=1),
  'tiny attention backward, head dim 64': _attention_backward(
    256, 64, heads=2, kv_heads=1
  ),
  'tiny decode': _decode(64, 'bfloat16', 2, 128, 4, 2),
  'tiny experts': _grouped(256, 128, 128, 2),
  'tiny experts backward': _grouped(256, 128, 128, 2, backward=True),
  'tiny W8A8': _quantized(16, _F8, _F8, 256, 256),
  'tiny loss': _loss(128, 64, 512),
  'tiny norm': _norm(64, 256),
  'tiny norm backward': _norm(64, 256, backward=True),
}
