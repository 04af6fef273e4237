"""Products of a serving model: by experts, and with weights of few bits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import gpu_floor
from experiments.benchmarks.gpu_record import Section
from experiments.benchmarks.gpu_timing import Contender
from experiments.benchmarks.gpu_timing import JaxCalls
from experiments.benchmarks.gpu_timing import compare
from experiments.benchmarks.gpu_timing import relative_error
from pallas_kernels.common import dispatch
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.quantized_matmul import quantize_weights
from pallas_kernels.quantized_matmul import quantized_matmul

_BF16 = jnp.bfloat16
_TOLERANCE = 1e-2
# Rows, or columns, of a result that are checked.
_CHECKED = 64
# What a run reads, at least, before it reads the same again: the L2 cache of
# these GPUs has 50 MB.
_ROTATED_BYTES = 400e6
_MAX_SETS = 16
_F8 = 'float8_e4m3fn'
# Where XLA has no kernel of its own for `ragged_dot`, it computes the product
# of every row with every expert.
_MOST_DENSE = 8

# Rows, K, N and experts: Qwen3-30B-A3B, 4,096 tokens to 8 experts each; a step
# of decoding of it; Mixtral 8x7B.
_EXPERTS = {
  'qwen3 30b up': (32768, 2048, 1536, 128),
  'qwen3 30b up, 64 tokens': (512, 2048, 1536, 128),
  'mixtral up': (8192, 4096, 14336, 8),
}
_SMOKE_EXPERTS = {'tiny': (64, 128, 128, 4)}


def grouped(section: Section) -> None:
  """Groups of uneven sizes, forward and with gradients."""
  shapes = _SMOKE_EXPERTS if section.smoke else _EXPERTS
  for name, shape in shapes.items():
    for with_gradients in (False, True):
      if not with_gradients or shape[0] >= shape[3] * _CHECKED or section.smoke:
        _grouped_row(section, name, shape, with_gradients)


def _grouped_row(section, name, shape, with_gradients):
  m, k, n, experts = shape
  sizes = _uneven(m, experts)
  num_bytes = 2.0 * (m * k + experts * k * n + m * n)
  count = _num_sets(section, num_bytes)
  keys = jax.random.split(jax.random.key(0), 3)
  normal = lambda key, *shape: jax.random.normal(key, shape, _BF16)
  rhs = normal(keys[0], experts, k, n) * k**-0.5
  lhs = [normal(key, m, k) for key in jax.random.split(keys[1], count)]
  d_out = normal(keys[2], m, n)

  def calls(multiply):
    def call(lhs, rhs, sizes, d_out):
      if not with_gradients:
        return multiply(lhs, rhs, sizes)
      f = lambda lhs, rhs: multiply(lhs, rhs, sizes)
      out, vjp = jax.vjp(f, lhs, rhs)
      return out, *vjp(d_out)

    return JaxCalls(call, *((x, rhs, sizes, d_out) for x in lhs))

  by = lambda name: functools.partial(grouped_matmul, implementation=name)
  builders = {
    'ours': by(section.implementation),
    'xla': by('xla'),
  }
  if experts <= _MOST_DENSE:
    builders['ragged_dot'] = jax.lax.ragged_dot
  check = functools.partial(_check_grouped, lhs[0], rhs, sizes, d_out)
  factor = 3.0 if with_gradients else 1.0
  moved = num_bytes * (3.0 if with_gradients else 1.0)
  compare(
    section,
    f'{name}, {m} rows, {k} x {n}, {experts} experts, '
    + ('forward + backward' if with_gradients else 'forward'),
    {
      who: Contender(
        functools.partial(calls, f), check, _TOLERANCE, is_ours=who == 'ours'
      )
      for who, f in builders.items()
    },
    lambda us: gpu_floor.figures(
      section, us, flops=factor * 2.0 * m * k * n, num_bytes=moved
    ),
  )


def _uneven(m, experts):
  """Sizes of groups as a router's: random, some empty if they are many."""
  shares = np.random.default_rng(0).dirichlet(np.ones(experts))
  sizes = np.floor(shares * m).astype(np.int32)
  sizes[np.argmax(sizes)] += m - sizes.sum()
  return jnp.asarray(sizes)


def _check_grouped(lhs, rhs, sizes, d_out, found):
  """Some rows of the result, and of both gradients, in float32."""
  out, *gradients = found if isinstance(found, tuple) else (found,)
  ends = np.cumsum(np.asarray(sizes))
  rows = np.linspace(0, len(lhs) - 1, _CHECKED).astype(np.int32)
  owners = np.searchsorted(ends, rows, side='right')
  f32 = lambda x: x.astype(jnp.float32)
  dot = functools.partial(jnp.einsum, precision='highest')
  matrices = rhs[owners[:, None]][:, 0]
  actual = [out[rows]]
  expected = [dot('mk,mkn->mn', f32(lhs[rows]), f32(matrices))]
  if gradients:
    d_lhs, d_rhs = gradients
    largest = int(np.argmax(np.asarray(sizes)))
    start, end = ends[largest] - int(sizes[largest]), ends[largest]
    actual += [d_lhs[rows], d_rhs[largest, :, :_CHECKED]]
    expected += [
      dot('mn,mkn->mk', f32(d_out[rows]), f32(matrices)),
      dot('mk,mn->kn', f32(lhs[start:end]), f32(d_out[start:end, :_CHECKED])),
    ]
  return relative_error(actual, expected)


def quantized(section: Section) -> None:
  """W8A8 and W4A16 at few rows, and at many."""
  k, n = (256, 256) if section.smoke else (4096, 14336)
  for m in (16,) if section.smoke else (16, 4096):
    for name, dtype, activations in (
      ('W8A8 float8', _F8, _F8),
      ('W4A16', 'int4', None),
      ('W8A16 int8', 'int8', None),
    ):
      _quantized_row(
        section, f'{name}, {m} x {k} x {n}', m, k, n, dtype, activations
      )


def _quantized_row(section, name, m, k, n, dtype, activations):
  weight_bytes = k * n * (0.5 if dtype == 'int4' else 1.0)
  num_bytes = weight_bytes + 2.0 * (m * k + m * n)
  keys = jax.random.split(jax.random.key(0), 1 + _num_sets(section, num_bytes))
  x = jax.random.normal(keys[0], (m, k), _BF16)
  narrow = jax.jit(functools.partial(quantize_weights, dtype=dtype))
  matrices = [
    narrow(jax.random.normal(key, (k, n)) * k**-0.5) for key in keys[1:]
  ]
  num_bytes += matrices[0][1].nbytes
  static = dict(activations=activations)

  def calls(implementation):
    multiply = functools.partial(
      quantized_matmul, implementation=implementation, **static
    )
    return JaxCalls(multiply, *((x, *matrix) for matrix in matrices))

  def check(out):
    weights, scales = matrices[0]
    reference = dispatch.load('quantized_matmul', 'reference')
    cut = slice(None), slice(0, _CHECKED)
    expected = reference(
      x.astype(jnp.float32), weights[cut], scales[..., :_CHECKED], **static
    )
    return relative_error(out[cut], expected)

  by = lambda name: functools.partial(calls, name)
  compare(
    section,
    name,
    {
      'ours': Contender(
        by(section.implementation), check, _TOLERANCE, is_ours=True
      ),
      'xla': Contender(by('xla'), check, _TOLERANCE),
      'bfloat16 weights': _wide(section, x, n),
    },
    lambda us: gpu_floor.figures(
      section,
      us,
      flops=2.0 * m * k * n,
      num_bytes=num_bytes,
      peak='fp8_flops' if activations else 'bf16_flops',
    ),
  )


def _wide(section, x, n):
  """What is to be beaten: a product with bfloat16 weights."""
  k = x.shape[1]
  keys = jax.random.split(jax.random.key(1), _num_sets(section, 2.0 * k * n))
  matrix = lambda key: jax.random.normal(key, (k, n), _BF16)

  def check(out):
    some = matrix(keys[0])[:, :_CHECKED]
    wide = (a.astype(jnp.float32) for a in (x, some))
    expected = jnp.matmul(*wide, precision='highest')
    return relative_error(out[:, :_CHECKED], expected)

  build = lambda: JaxCalls(jnp.matmul, *((x, matrix(key)) for key in keys))
  return Contender(build, check, _TOLERANCE)


def _num_sets(section, num_bytes):
  """How many sets of arguments the L2 cache can't keep."""
  most = 2 if section.smoke else _MAX_SETS
  return min(max(math.ceil(_ROTATED_BYTES / num_bytes), 1), most)
