"""What this GPU can do at most: products, and copies of its memory.

Shares in the other sections are of these figures, the best of who computes
them, not of data sheets: a GPU under load does not keep its boost clock.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import gpu_torch
from experiments.benchmarks.gpu_record import Section
from experiments.benchmarks.gpu_timing import Contender
from experiments.benchmarks.gpu_timing import JaxCalls
from experiments.benchmarks.gpu_timing import as_numpy
from experiments.benchmarks.gpu_timing import compare
from experiments.benchmarks.gpu_timing import relative_error

_F8 = jnp.float8_e4m3fn
_BF16 = jnp.bfloat16
# Rows of a product that are checked.
_CHECKED = 64


def run(section: Section) -> None:
  """Sets 'bf16_flops', 'fp8_flops' and 'bytes_per_s', each a second."""
  n = 256 if section.smoke else 8192
  _matmul(section, 'bf16_flops', n, _BF16)
  _matmul(section, 'fp8_flops', n, _F8)
  _copy(section, 1 << (16 if section.smoke else 30))


def _matmul(section, peak, n, dtype):
  row = f'{jnp.dtype(dtype).name} product of {n}^3'
  keys = jax.random.split(jax.random.key(0))
  a, b = (jax.random.normal(k, (n, n), _BF16).astype(dtype) for k in keys)
  expected = jnp.matmul(
    *(x.astype(jnp.float32) for x in (a[:_CHECKED], b)), precision='highest'
  )

  def check(out):
    return relative_error(out[:_CHECKED], expected)

  contenders = {'dot': (lambda: JaxCalls(_dot, (a, b)))}
  if dtype == _F8:
    scale = jnp.float32(1)
    # What XLA knows as a product of eight bits.
    contenders['scaled dot'] = lambda: JaxCalls(
      _scaled_dot, (a, b, scale, scale)
    )
  contenders['torch'] = lambda: _torch_matmul(a, b)
  flops = 2.0 * n**3
  compare(
    section,
    row,
    {k: Contender(f, check, 2e-2) for k, f in contenders.items()},
    lambda us: dict(tflops=1e-6 * flops / us),
  )
  _keep(section, row, contenders, peak, flops)


def _dot(a, b):
  return jnp.dot(a, b, preferred_element_type=_BF16)


def _scaled_dot(a, b, a_scale, b_scale):
  a, b = a.astype(_BF16), b.astype(_BF16)
  return jnp.dot(a * a_scale.astype(_BF16), b * b_scale.astype(_BF16))


def _torch_matmul(a, b):
  torch = gpu_torch.load()
  x, y = gpu_torch.tensor(a), gpu_torch.tensor(b)
  if a.dtype != _F8:
    return gpu_torch.TorchCalls(torch.matmul, (x, y))
  if not torch.cuda.is_available():
    raise NotImplementedError('products of eight bits are for CUDA')
  one = torch.ones((), device=x.device)
  call = functools.partial(
    torch._scaled_mm, scale_a=one, scale_b=one, out_dtype=torch.bfloat16
  )
  # The second matrix lies column by column.
  return gpu_torch.TorchCalls(call, (x, y.t().contiguous().t()))


def _copy(section, size):
  row = f'copy of {2 * size} bytes'
  x = jax.lax.iota(jnp.uint16, size)
  num_bytes = 2.0 * x.nbytes

  def check(out):
    n = _CHECKED
    return float(abs(as_numpy(out[:n]) - as_numpy(x[:n]) - 1).max())

  def torch_add():
    # It has few operators for unsigned numbers.
    signed = jax.lax.bitcast_convert_type(x, jnp.int16)
    return gpu_torch.TorchCalls(lambda t: t + 1, (gpu_torch.tensor(signed),))

  contenders = dict(
    add=lambda: JaxCalls(lambda x: x + jnp.uint16(1), (x,)), torch=torch_add
  )
  compare(
    section,
    row,
    {k: Contender(f, check, 0.0) for k, f in contenders.items()},
    lambda us: dict(gb_per_s=1e-3 * num_bytes / us),
  )
  _keep(section, row, contenders, 'bytes_per_s', num_bytes)


def _keep(section, row, contenders, peak, amount):
  rows = [section.find(row, name) or {} for name in contenders]
  times: list[Any] = [r['us'] for r in rows if 'us' in r]
  if times:
    section.set_peaks(**{peak: 1e6 * amount / min(times)})
