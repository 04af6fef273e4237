"""Causal attention, forward and with its gradients, against cuDNN and PyTorch.

FLOPs as papers count them (Dao, https://arxiv.org/abs/2307.08691, section 4.1):
4 B N T^2 H, half of that because of causality, and 3.5 times as many with the
gradients, whatever a kernel computes again.
"""

import functools

import jax
import jax.numpy as jnp

from experiments.benchmarks import gpu_floor
from experiments.benchmarks import gpu_torch
from experiments.benchmarks.gpu_record import Section
from experiments.benchmarks.gpu_timing import Contender
from experiments.benchmarks.gpu_timing import JaxCalls
from experiments.benchmarks.gpu_timing import compare
from experiments.benchmarks.gpu_timing import relative_error
from pallas_kernels.flash_attention import flash_attention

_BATCH, _HEADS, _KV_HEADS = 4, 32, 8
# Length and head dim, the most important first.
_SHAPES = (
  (4096, 128),
  (16384, 128),
  (4096, 64),
  (4096, 256),
  (1024, 128),
  (32768, 128),
)
_SMOKE_SHAPES = ((256, 64),)
# Queries of a chunk of the reference.
_CHUNK = 512
_FORWARD_TOLERANCE, _GRADIENT_TOLERANCE = 1e-2, 2e-2
_BACKWARD_FACTOR = 3.5


def run(section: Section) -> None:
  """All shapes, forward; then those with gradients, as they alternate."""
  for length, head_dim in _SMOKE_SHAPES if section.smoke else _SHAPES:
    for with_gradients in (False, True):
      _row(section, length, head_dim, with_gradients)


def reference(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Causal attention of the heads of one group, in float32.

  Args:
    q: [T,G,H].
    k: [T,H], whose scores are divided by sqrt(H).
    v: [T,H].

  Returns:
    [T,G,H]. A chunk of queries at a time, also as it is differentiated.
  """
  t, h = k.shape
  chunk = min(_CHUNK, t)
  einsum = functools.partial(jnp.einsum, precision='highest')

  @jax.checkpoint
  def of_chunk(args):
    q, first = args
    s = einsum('tgh,sh->gts', q, k) * h**-0.5
    seen = first + jnp.arange(chunk)[:, None] >= jnp.arange(t)
    p = jax.nn.softmax(jnp.where(seen, s, -jnp.inf), axis=-1)
    return einsum('gts,sh->tgh', p, v)

  chunks = q.reshape(t // chunk, chunk, *q.shape[1:])
  out = jax.lax.map(of_chunk, (chunks, jnp.arange(0, t, chunk)))
  return out.reshape(q.shape)


@functools.partial(jax.jit, static_argnums=0)
def _expected(with_gradients, q, k, v, d_out):
  """The result, and gradients, of the first group of the first row."""
  group = q.shape[2] // k.shape[2]
  q, d_out = (x[0, :, :group].astype(jnp.float32) for x in (q, d_out))
  k, v = (x[0, :, 0].astype(jnp.float32) for x in (k, v))
  if not with_gradients:
    return (reference(q, k, v),)
  out, vjp = jax.vjp(reference, q, k, v)
  return out, *vjp(d_out)


def _row(section, length, head_dim, with_gradients):
  batch, heads, kv_heads = _BATCH, _HEADS, _KV_HEADS
  if section.smoke:
    batch, heads, kv_heads = 2, 4, 2
  name = f'{length} tokens, head dim {head_dim}, ' + (
    'forward + backward' if with_gradients else 'forward'
  )
  keys = jax.random.split(jax.random.key(0), 4)
  normal = lambda key, n: jax.random.normal(
    key, (batch, length, n, head_dim), jnp.bfloat16
  )
  sizes = (heads, kv_heads, kv_heads, heads)
  q, k, v, d_out = map(normal, keys, sizes)
  arrays = (q, k, v, d_out) if with_gradients else (q, k, v)
  expected = []

  def check(out):
    if not expected:
      # Computed once somebody has a result.
      expected.extend(_expected(with_gradients, q, k, v, d_out))
    group = heads // kv_heads
    out = out if with_gradients else (out,)
    cuts = (group, group, 1, 1)
    parts = [x[0, :, :n] for x, n in zip(out, cuts, strict=False)]
    wanted = [e.reshape(e.shape[0], -1, head_dim) for e in expected]
    return relative_error(parts, wanted)

  flops = 2.0 * batch * heads * length**2 * head_dim
  flops *= _BACKWARD_FACTOR if with_gradients else 1.0
  tolerance = _GRADIENT_TOLERANCE if with_gradients else _FORWARD_TOLERANCE
  builders = _contenders(section, arrays)
  contenders = {
    who: Contender(build, check, tolerance, is_ours=who == 'ours')
    for who, build in builders.items()
  }
  compare(
    section,
    name,
    contenders,
    lambda us: gpu_floor.figures(section, us, flops=flops),
  )


def _contenders(section, arrays):
  ours = functools.partial(
    flash_attention, implementation=section.implementation
  )
  cudnn = functools.partial(
    jax.nn.dot_product_attention, is_causal=True, implementation='cudnn'
  )

  def jax_calls(attend):
    if len(arrays) == 3:
      return JaxCalls(attend, arrays)

    def with_gradients(q, k, v, d_out):
      out, vjp = jax.vjp(attend, q, k, v)
      return out, *vjp(d_out)

    return JaxCalls(with_gradients, arrays)

  def by_cudnn():
    if jax.default_backend() != 'gpu':
      raise NotImplementedError('cuDNN is for CUDA')
    return jax_calls(cudnn)

  return {
    'ours': lambda: jax_calls(ours),
    'cudnn': by_cudnn,
    'torch flash': lambda: gpu_torch.attention('FLASH_ATTENTION', arrays),
    'torch cudnn': lambda: gpu_torch.attention('CUDNN_ATTENTION', arrays),
    'flash_attn': lambda: gpu_torch.flash_attn(arrays),
  }
