"""flash_attention by cuDNN: with JAX's own function for cuDNN, and lowered.

`jax.nn.dot_product_attention` promises the same results, shapes and gradients
of every implementation, so its XLA one stands in for cuDNN where there is none.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import chip
from pallas_kernels.flash_attention import cases
from pallas_kernels.flash_attention import cudnn
from pallas_kernels.flash_attention import reference

_TOLERANCE = {'bfloat16': 1e-2, 'float16': 2e-3}
_STATIC = dict(scale=0.3, soft_cap=None)
_VERSION = 91000


@pytest.fixture
def stand_in(monkeypatch):
  """XLA in the place of cuDNN; returns a list of how it was called."""
  calls = []
  original = jax.nn.dot_product_attention

  def attend(*args, implementation, **kwargs):
    assert implementation == 'cudnn'
    calls.append(kwargs)
    # In float32, then rounded, as cuDNN does. CPUs have no such products.
    exact = (a.astype(jnp.float32) for a in args)
    results = original(*exact, implementation='xla', **kwargs)
    return jax.tree.map(lambda a: a.astype(args[0].dtype), results)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', attend)
  return calls


@pytest.fixture
def some_cudnn(monkeypatch):
  """JAX asks for the version of cuDNN when it traces a call of it."""
  from jax._src.cudnn import fused_attention_stablehlo as module

  class Versions:
    cudnn_get_version = staticmethod(lambda: _VERSION)

  monkeypatch.setattr(module, 'cuda_versions', Versions)


def _args(dtype='bfloat16', b=2, t=24, n=6, k=2, h=16):
  keys = jax.random.split(jax.random.key(0), 3)
  q = jax.random.normal(keys[0], (b, t, n, h), dtype)
  key, value = (jax.random.normal(x, (b, t, k, h), dtype) for x in keys[1:])
  return q, key, value, None, None, None, None, None


def _value_and_grads(f, args, d_out, d_lse):
  def of_qkv(q, k, v):
    out, lse = f(q, k, v, *args[3:], **_STATIC)
    loss = jnp.sum(out.astype(jnp.float32) * d_out)
    return loss + jnp.sum(lse * d_lse), (out, lse)

  grad = jax.value_and_grad(of_qkv, (0, 1, 2), has_aux=True)
  (_, results), grads = jax.jit(grad)(*args[:3])
  return *results, *grads


def _assert_close(actual, expected, dtype):
  tolerance = _TOLERANCE[dtype]
  for a, e in zip(actual, expected, strict=True):
    assert a.shape == e.shape and a.dtype == e.dtype
    a, e = np.float32(a), np.float32(e)
    rms = lambda a: np.sqrt(np.mean(np.square(a)))
    assert rms(a - e) <= tolerance * rms(e)


@pytest.mark.parametrize('dtype', _TOLERANCE)
@pytest.mark.parametrize('of_lse', [0.0, 1.0, 1e3])
def test_equals_the_reference(stand_in, dtype, of_lse):
  args = _args(dtype)
  keys = jax.random.split(jax.random.key(1), 2)
  d_out = jax.random.normal(keys[0], args[0].shape)
  d_lse = of_lse * jax.random.normal(keys[1], (2, 6, 24))
  actual, expected = (
    _value_and_grads(f, args, d_out, d_lse)
    for f in (cudnn.flash_attention, reference.flash_attention)
  )
  _assert_close(actual, expected, dtype)
  assert all(call['is_causal'] and call['scale'] == 0.3 for call in stand_in)


def test_the_gradient_of_lse_alone(stand_in):
  args = _args('float16')
  d_lse = jax.random.normal(jax.random.key(1), (2, 6, 24))
  actual, expected = (
    _value_and_grads(f, args, 0.0, d_lse)
    for f in (cudnn.flash_attention, reference.flash_attention)
  )
  _assert_close(actual[:4], expected[:4], 'float16')
  assert not actual[4].any() and not expected[4].any()


def test_no_gradient_of_lse_is_one_of_zeros(stand_in):
  args = _args()
  out, lse = cudnn.flash_attention_forward(*args, **_STATIC)
  backward = functools.partial(
    cudnn.flash_attention_backward, *args, out, lse, out, **_STATIC
  )
  for a, e in zip(backward(None), backward(jnp.zeros_like(lse)), strict=True):
    assert a is e is None or (a == e).all()


def test_zeros_cost_no_more_attention(stand_in):
  args = _args()

  def has_branch(i):
    result = lambda q: cudnn.flash_attention(q, *args[1:], **_STATIC)[i]
    loss = lambda q: jnp.square(result(q).astype(jnp.float32)).sum()
    grad = jax.jit(jax.grad(loss))
    return 'conditional(' in grad.lower(args[0]).compile().as_text()

  # Of the output, and of the log-sum-exp.
  assert not has_branch(0) and has_branch(1)


def _sharded(f, args):
  mesh = jax.make_mesh(
    (2,),
    ('data',),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:2],
  )
  local = lambda q, k, v: f(q, k, v, *args[3:], **_STATIC)
  rows = jax.P('data')
  g = jax.shard_map(local, mesh=mesh, in_specs=(rows,) * 3, out_specs=rows)
  return lambda *args, **kwargs: g(*args[:3])


def test_inside_shard_map(stand_in):
  args = _args()
  d_lse = jax.random.normal(jax.random.key(1), (2, 6, 24))
  actual, expected = (
    _value_and_grads(f, args, 1.0, d_lse)
    for f in (
      _sharded(cudnn.flash_attention, args),
      reference.flash_attention,
    )
  )
  _assert_close(actual, expected, 'bfloat16')


@pytest.mark.parametrize(
  'shape, sharded',
  [({}, False), (dict(t=38, k=1), False), (dict(t=2, h=128), True)],
)
def test_lowers_for_cuda(some_cudnn, shape, sharded):
  args = _args(**shape)
  f = cudnn.flash_attention
  if sharded:
    f = _sharded(f, args)

  def loss(q, k, v):
    out, lse = f(q, k, v, *args[3:], **_STATIC)
    return out.astype(jnp.float32).sum() + lse.sum()

  grad = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
  text = grad.trace(*args[:3]).lower(lowering_platforms=('cuda',)).as_text()
  # Forward; then once more, and with keys for values, each with its gradient.
  assert text.count('@__cudnn$fmhaSoftmax(') == 3
  assert text.count('@__cudnn$fmhaSoftmaxBackward(') == 2


def test_declines_without_cudnn():
  with pytest.raises(NotImplementedError, match='cuDNN is not detected'):
    jax.eval_shape(
      functools.partial(cudnn.flash_attention, **_STATIC), *_args()
    )


@pytest.mark.parametrize(
  'name, reason',
  [
    ('causal', 'float32'),
    ('segments', 'segment_ids'),
    ('window', 'window'),
    ('sinks', 'sinks'),
    ('striped', 'window'),
    ('shuffled', 'q_positions'),
    ('soft_cap', 'cap'),
  ],
)
def test_declines_what_cudnn_is_not_asked(stand_in, name, reason):
  case = cases.SMALL[name](jax.random.key(0))
  args = [*case['args']]
  if reason != 'float32':
    args[:3] = (a.astype(jnp.bfloat16) for a in args[:3])
  with pytest.raises(NotImplementedError, match=reason):
    cudnn.flash_attention(*args, **case['kwargs'])
  assert not stand_in


@pytest.mark.parametrize('shape', [dict(h=12), dict(h=264), dict(t=37)])
def test_declines_shapes(some_cudnn, shape):
  f = functools.partial(cudnn.flash_attention, **_STATIC)
  with pytest.raises(NotImplementedError, match=f'{[*shape.values()][0]}'):
    jax.eval_shape(f, *_args(**shape))


def test_declines_older_gpus(monkeypatch, stand_in):
  class Turing:
    device_kind, compute_capability = 'Tesla T4', '7.5'

  monkeypatch.setattr(chip, 'default_gpu', lambda: Turing)
  with pytest.raises(NotImplementedError, match='T4 has compute capability'):
    cudnn.flash_attention_forward(*_args(), **_STATIC)
