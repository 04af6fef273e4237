"""The Hopper backward against gradients of the reference in float32."""

import functools

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import hopper
from pallas_kernels.flash_attention import cases
from pallas_kernels.flash_attention import forward_plan
from pallas_kernels.flash_attention import pallas_gpu_backward
from pallas_kernels.flash_attention import reference
from pallas_kernels.flash_attention.pallas_gpu_backward_tiles import Plan
from tests.pallas_kernels.gpu.async_wgmma import async_wgmma

needs_interpreter = pytest.mark.skipif(
  not hasattr(plgpu, 'force_gpu_interpret_mode'),
  reason='this JAX has no interpreter for GPU kernels',
)
_FEW_STAGES = dict(dq_stages=2, dkv_stages=2)
_TOLERANCE = 1e-2


def _case(**kw):
  """A case in bfloat16, b = 1 and one kv head unless said otherwise."""
  defaults = dict(b=1, t=300, n=1, k=1, h=64, dtype='bfloat16')
  return cases._case(jax.random.key(0), **defaults | kw)


def _rms(x):
  return float(jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)))))


def _gradients(case, config, with_d_lse):
  """Expected and computed ones."""
  q, k, v, segment_ids, window, sinks, *positions = case['args']

  def attend(q, k, v, sinks):
    return reference.flash_attention(
      *(q, k, v, segment_ids, window, sinks, *positions), **case['kwargs']
    )

  as_f32 = [x.astype(jnp.float32) for x in (q, k, v)]
  (out, lse), vjp = jax.vjp(attend, *as_f32, sinks)
  of_out, of_lse = jax.random.split(jax.random.key(1))
  d_out = jax.random.normal(of_out, out.shape, q.dtype)
  d_lse = jax.random.normal(of_lse, lse.shape) if with_d_lse else None
  expected = vjp(
    (d_out.astype(jnp.float32), jnp.zeros_like(lse) if d_lse is None else d_lse)
  )
  backward = functools.partial(
    pallas_gpu_backward.flash_attention_backward,
    config=config,
    **case['kwargs'],
  )
  actual = jax.jit(backward)(
    *case['args'], out.astype(q.dtype), lse, d_out, d_lse
  )
  return expected, jax.block_until_ready(actual)


def _check(*, races=True, config=None, with_d_lse=True, case=None, **kw):
  """Compares all gradients; returns those of q, k and v."""
  case = _case(**kw) if case is None else case
  params = plgpu.InterpretGPUParams(detect_races=races)
  with plgpu.force_gpu_interpret_mode(params), async_wgmma():
    expected, actual = _gradients(case, config, with_d_lse)
  for name, e, a in zip('qkvs', expected, actual, strict=True):
    if e is None:
      assert a is None
      continue
    assert a.shape == e.shape
    assert _rms(a - e) <= _TOLERANCE * _rms(e), name
  assert [x.dtype.name for x in actual[:3]] == ['bfloat16'] * 3
  return actual[:3]


@needs_interpreter
def test_more_tiles_than_stages_and_several_heads_in_a_sum(monkeypatch):
  gpu = hopper.Gpu('h200', num_sms=1)
  monkeypatch.setattr(hopper, 'current', lambda: gpu)
  _check(t=260, n=2, config=_FEW_STAGES)


@needs_interpreter
def test_everything_at_head_dim_128():
  # More stages than tiles.
  _check(
    t=130,
    h=128,
    segments=True,
    window=70,
    soft_cap=3.0,
    sinks=True,
    with_d_lse=False,
  )


@needs_interpreter
def test_rows_of_a_batch_differ():
  _check(b=2, t=130, h=24, segments=True)


@needs_interpreter
def test_one_warpgroup_for_dk_and_one_for_dv():
  _check(t=190, n=2, h=160, segments=True, window=70, soft_cap=2.0)


@needs_interpreter
def test_positions_of_two_shards_of_a_stripe():
  _check(t=140, h=256, positions='striped', window=130)


@needs_interpreter
def test_some_queries_among_more_keys():
  _check(t=150, s=260, positions='among_more', segments=True, window=130)


@needs_interpreter
def test_a_length_of_one():
  _check(t=1, n=2, sinks=True, races=False)


@needs_interpreter
def test_queries_without_keys_have_zero_gradients():
  case = _case(t=140)
  index = jnp.arange(140, dtype=jnp.int32)[None]
  case['args'] = (*case['args'][:-2], index, index + 130)
  # A block of queries and one of keys with no tile to visit.
  dq, dk, dv = _check(case=case)
  assert not np.any(dq[:, :130])
  assert not np.any(dk[:, -130:]) and not np.any(dv[:, -130:])


@needs_interpreter
def test_in_the_interpreter_as_it_is():
  case = _case(t=70, n=2)
  with hopper.interpret():
    expected, actual = _gradients(case, None, True)
  for e, a in zip(expected[:3], actual[:3], strict=True):
    assert _rms(a - e) <= _TOLERANCE * _rms(e)


def _shapes(case):
  """Arguments of the backward as shapes, floats in bfloat16."""
  q, k, v, segments, window, sinks, *positions = jax.eval_shape(
    lambda: case(jax.random.key(0))['args']
  )
  q, k, v = (jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in (q, k, v))
  lse = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
  return (q, k, v, segments, window, sinks, *positions, q, lse, q, lse)


@pytest.mark.parametrize('name', [*cases.SMALL, *cases.MODEL])
def test_lowers_for_cuda(name):
  case = (cases.SMALL | cases.MODEL)[name]
  static = case(jax.random.key(0))['kwargs'] if name in cases.SMALL else None
  static = static or dict(scale=0.1, soft_cap=None)
  backward = functools.partial(
    pallas_gpu_backward.flash_attention_backward, **static
  )
  with pltpu.force_tpu_interpret_mode(None):
    traced = jax.jit(backward).trace(*_shapes(case))
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert text.count('mosaic_gpu') >= 2


def test_what_it_cannot_do():
  def backward(dtype='bfloat16', **kw):
    case = _case(**kw, t=8, dtype=dtype)
    q = case['args'][0]
    lse = jnp.zeros((1, 1, 8))
    static = dict(scale=1.0, soft_cap=None)
    jax.eval_shape(
      functools.partial(pallas_gpu_backward.flash_attention_backward, **static),
      *(*case['args'], q, lse, q, None),
    )

  with pytest.raises(NotImplementedError, match='float32'):
    backward(dtype='float32')
  with pytest.raises(NotImplementedError, match='320'):
    backward(h=320)
  with pytest.raises(NotImplementedError, match='shared memory'):
    backward(h=256, positions='shuffled', segments=True)


def test_candidates_are_configurations_it_takes():
  case = _case(t=1024, n=2)
  args = (*case['args'], *[None] * 4)
  features = pallas_gpu_backward.backward_features(*args, **case['kwargs'])
  assert features['length'] == 1024 and features['group'] == 2
  candidates = pallas_gpu_backward.backward_candidates(
    'h200', *args, **case['kwargs']
  )
  assert {tuple(c) for c in candidates} == {('dq_stages', 'dkv_stages')}
  assert len(candidates) == 9


def test_ranges_of_queries_for_keys():
  rng = np.random.default_rng(0)
  size, block, chunk, window = 96, 16, 8, 30
  i, j = (rng.permutation(size)[None] // 2 for _ in 'ij')
  segments = np.sort(rng.integers(0, 3, (1, size)))
  behind = i[0][:, None] - j[0][None]
  same = segments[0][:, None] == segments[0][None]
  sees = (behind >= 0) & (behind < window) & same
  tiles = sees.reshape(size // chunk, chunk, size // block, block)
  found = forward_plan.ranges(
    *(-jnp.asarray(j), -jnp.asarray(i), jnp.int32(window)),
    *(jnp.asarray(segments),) * 2,
    block_q=block,
    chunk=chunk,
  )
  for n, (a, b, c, d) in enumerate(np.reshape(found, (-1, 4))):
    of_block = tiles[:, :, n]
    assert not of_block[:a].any() and not of_block[d:].any()
    assert of_block[b:c].all()


@pytest.mark.parametrize(
  ('heads', 'kv_heads', 'parts'), [(32, 8, 1), (8, 4, 2), (12, 1, 6), (4, 1, 4)]
)
def test_idle_multiprocessors_get_a_part_of_a_group(heads, kv_heads, parts):
  plan = Plan(
    head_dim=64,
    group=heads // kv_heads,
    parts=1,
    stages=2,
    v_stages=2,
    scale=1.0,
    soft_cap=None,
    kinds=1,
    by_position=False,
    has_window=False,
  )
  found = pallas_gpu_backward._in_parts(plan, (1, 4096, kv_heads, 64), 128)
  assert (found.parts, found.group) == (parts, heads // kv_heads // parts)
