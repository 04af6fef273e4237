"""flash_attention's forward for Hopper: interpreted, lowered and compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import explain_dispatch
from pallas_kernels import gpu_compiler
from pallas_kernels.common import dispatch
from pallas_kernels.common import hopper
from pallas_kernels.flash_attention import cases
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_attention import pallas_gpu
from pallas_kernels.flash_attention import reference
from tests.pallas_kernels.gpu.async_wgmma import async_wgmma

needs_interpreter = pytest.mark.skipif(
  not hopper.can_interpret(), reason='needs the GPU interpreter of JAX 0.12'
)
needs_compiler = pytest.mark.skipif(
  not gpu_compiler.is_installed(), reason='needs the GPU compiler'
)
_MORE = {
  'many_tiles': dict(t=400, n=2, k=1, b=1, h=64),
  'wide': dict(t=130, n=2, k=2, b=1, h=200, window=70),
  'every_option': dict(
    t=260, segments=True, window=90, soft_cap=3.0, sinks=True, b=2, h=64
  ),
}


def _case(name):
  """Arguments in bfloat16, and static ones."""
  if name in _MORE:
    case = cases._case(jax.random.key(2), **_MORE[name])
  else:
    case = cases.SMALL[name](jax.random.key(2))
  args = [
    a.astype(jnp.bfloat16) if i < 3 else a for i, a in enumerate(case['args'])
  ]
  return args, case['kwargs']


def _check(args, kwargs, tolerance=5e-3, **params):
  """The interpreted kernel agrees with the reference."""
  config = kwargs.pop('config', None)
  with hopper.interpret(**params), async_wgmma():
    out, lse = jax.jit(
      functools.partial(
        pallas_gpu.flash_attention_forward, **kwargs, config=config
      )
    )(*args)
  expected, expected_lse = reference.flash_attention(*args, **kwargs)
  assert out.dtype == expected.dtype and out.shape == expected.shape
  out, expected = np.float32(out), np.float32(expected)
  rms = np.sqrt(np.mean(np.square(expected)))
  assert np.sqrt(np.mean(np.square(out - expected))) <= tolerance * rms
  np.testing.assert_allclose(out, expected, atol=10 * tolerance * rms)
  np.testing.assert_allclose(lse, expected_lse, atol=1e-4, rtol=1e-5)


@needs_interpreter
@pytest.mark.parametrize('name', [*cases.SMALL, *_MORE])
def test_agrees_with_the_reference(name):
  args, kwargs = _case(name)
  _check(args, kwargs)


@needs_interpreter
@pytest.mark.parametrize('stages', [1, 2, 4])
@pytest.mark.parametrize('warpgroups', [2, 3])
def test_rings_of_any_size(stages, warpgroups):
  args, kwargs = _case('many_tiles')
  config = dict(block_kv=64, stages=stages, warpgroups=warpgroups)
  _check(args, kwargs | dict(config=config))


@pytest.fixture
def two_sms(monkeypatch):
  """Workers that have several blocks each."""
  monkeypatch.setattr(hopper, 'current', lambda: hopper.Gpu('h200', num_sms=2))


@needs_interpreter
@pytest.mark.parametrize('name', ['everything', 'many_tiles', 'wide', 'causal'])
def test_one_block_after_the_other(two_sms, name):
  args, kwargs = _case(name)
  _check(args, kwargs)


@needs_interpreter
@pytest.mark.parametrize('name', ['every_option', 'wide'])
def test_eight_bits(two_sms, name):
  args, kwargs = _case(name)
  args[:3] = [a.astype(jnp.float8_e4m3fn) for a in args[:3]]
  # Weights have three bits behind the point: half of 2 ** -4 is the worst.
  _check(args, kwargs, tolerance=2.5e-2)


def test_eight_bits_without_a_kernel():
  args, kwargs = _case('every_option')
  args[:3] = [a.astype(jnp.float8_e4m3fn) for a in args[:3]]
  out, lse = dispatch.load('flash_attention', 'xla')(*args, **kwargs)
  expected, expected_lse = reference.flash_attention(*args, **kwargs)
  assert out.dtype == expected.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    np.float32(out), np.float32(expected), atol=0.03, rtol=0.03
  )
  np.testing.assert_allclose(lse, expected_lse, rtol=1e-4, atol=1e-4)
  with pytest.raises(NotImplementedError, match='has no gradient'):
    loss = lambda q: flash_attention(q, *args[1:3]).sum().astype(jnp.float32)
    jax.grad(loss, allow_int=True)(args[0])


@needs_interpreter
def test_no_race(two_sms):
  args, kwargs = _case('every_option')
  config = dict(block_kv=64)
  _check(args, kwargs | dict(config=config), detect_races=True)


@needs_interpreter
def test_a_wrong_mask_is_noticed(monkeypatch):
  args, kwargs = _case('window')
  ranges = pallas_gpu.ranges
  # No tile is masked.
  unmasked = lambda *args, **sizes: (
    ranges(*args, **sizes).reshape(-1, 4)[:, [0, 0, 3, 3]].reshape(-1)
  )
  monkeypatch.setattr(pallas_gpu, 'ranges', unmasked)
  monkeypatch.setattr(
    pallas_gpu.pallas_gpu_forward._Worker,
    'masked',
    lambda self, wg, item, tile, s: s,
  )
  with pytest.raises(AssertionError):
    _check(args, kwargs)


@pytest.mark.parametrize('name', [*cases.SMALL, *_MORE])
def test_lowers_for_cuda(name):
  args, kwargs = _case(name)
  f = functools.partial(dispatch.dispatch, 'flash_attention', **kwargs)
  with dispatch.for_platform('cuda'):
    lowered = (
      jax.jit(f).trace(*args).lower(lowering_platforms=('cuda',)).as_text()
    )
  assert 'mosaic_gpu' in lowered and 'flash_attention_forward' in lowered


@needs_compiler
@pytest.mark.parametrize(
  'h, dtype, spills, tensor_cycles, share',
  [
    (64, 'bfloat16', 0, 512, 0.96),
    (128, 'bfloat16', 256, 1024, 1),
    (256, 'bfloat16', 256, 1024, 1),
    (128, 'float8_e4m3fn', 0, 512, 0.96),
  ],
)
def test_compiles_for_an_h200(h, dtype, spills, tensor_cycles, share):
  q = jax.ShapeDtypeStruct((1, 4096, 8, h), dtype)
  k = jax.ShapeDtypeStruct((1, 4096, 2, h), dtype)
  f = functools.partial(
    pallas_gpu.flash_attention_forward, scale=h**-0.5, soft_cap=None
  )
  args = q, k, k, None, None, None, None, None
  [kernel] = gpu_compiler.compile_for(f, *args).kernels
  assert not [w for w in kernel.warnings if 'serialized' in w]
  # What does not fit registers is used once a block.
  assert kernel.spill_bytes <= spills
  assert kernel.main_loop.counts['LDL'] + kernel.main_loop.counts['STL'] <= 2
  assert kernel.main_loop.tensor_cycles == tensor_cycles
  assert kernel.main_loop.tensor_share >= share


def _explained(dtype='bfloat16', h=128, **kwargs):
  x = jax.ShapeDtypeStruct((1, 256, 4, h), dtype)
  [choice] = explain_dispatch(
    flash_attention, x, x, x, platform='cuda', **kwargs
  )
  return choice


def test_what_it_declines():
  assert _explained().implementation == 'pallas_gpu'
  for kwargs, why in [
    (dict(dtype='float32'), 'float32 and float32, and must be'),
    (dict(h=320), 'head_dim 320 > 256'),
    (dict(scale=-1.0), 'scale=-1.0 is not positive'),
  ]:
    choice = _explained(**kwargs)
    assert choice.implementation != 'pallas_gpu'
    assert why in choice.declined['pallas_gpu'] and why in str(choice)


def test_older_gpus_are_declined(monkeypatch):
  class A100:
    platform, device_kind = 'gpu', 'NVIDIA A100'
    compute_capability = '8.0'

  monkeypatch.setattr(hopper.chip, 'default_gpu', A100)
  choice = _explained()
  assert choice.implementation != 'pallas_gpu'
  assert 'A100 has compute capability 8.0' in choice.declined['pallas_gpu']
  A100.compute_capability = '9.0'
  A100.device_kind = 'NVIDIA H100 80GB HBM3'
  assert _explained().implementation == 'pallas_gpu'
  assert hopper.current().name == 'h100'


def test_a_configuration_that_does_not_fit():
  args, kwargs = _case('causal')
  config = dict(block_kv=512)
  with pytest.raises(ValueError, match='does not fit a head dim of 64'):
    pallas_gpu.flash_attention_forward(*args, **kwargs, config=config)
