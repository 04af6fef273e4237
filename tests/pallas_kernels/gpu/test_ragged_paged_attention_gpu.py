"""ragged_paged_attention for GPUs: interpreted, lowered, and its list of work.

On a JAX without an interpreter for Mosaic GPU kernels numbers are not tested.
"""

import functools

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import hopper
from pallas_kernels.ragged_paged_attention import cases
from pallas_kernels.ragged_paged_attention import pallas_gpu
from pallas_kernels.ragged_paged_attention import pallas_gpu_plan as plan_lib
from pallas_kernels.ragged_paged_attention import pallas_gpu_stream
from pallas_kernels.ragged_paged_attention import pallas_gpu_tile
from pallas_kernels.ragged_paged_attention import reference

needs_interpreter = pytest.mark.skipif(
  not hasattr(plgpu, 'force_gpu_interpret_mode'),
  reason='this JAX does not interpret Mosaic GPU kernels',
)
_TOLERANCE = 1e-2
_SMALL = dict(n=4, k=2, h=64, page_size=16, dtype='bfloat16')


@pytest.fixture(autouse=True)
def register_operands(monkeypatch):
  """Lets the interpreter's WGMMA have its left operand in registers."""
  if not hasattr(plgpu, 'force_gpu_interpret_mode'):
    return
  from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
  from jax._src.pallas.mosaic_gpu.interpret import shared_memory

  original = gpu_callbacks.wgmma

  def wgmma(**kwargs):
    a = np.asarray(kwargs['a_allocation_key_as_array'])
    if a.dtype.kind in 'iu':  # The key of a buffer.
      return original(**kwargs)
    memory, thread = gpu_callbacks._get_shared_memory(), kwargs['thread']
    info = shared_memory.GPULoggingInfo(
      kwargs['mesh_location'], thread, kwargs['source_info']
    )

    def buffer(name):
      key = kwargs[f'{name}_allocation_key_as_array']
      key = gpu_callbacks.HostAllocationKey.from_array(key)
      steps = kwargs[f'{name}_transforms']
      steps = gpu_callbacks._remove_noop_transforms(steps)
      return key, memory.access(key, jax.tree.map(int, steps))

    read = lambda at: memory.get_buffer_content(*at, thread, logging_info=info)
    b, acc = read(buffer('b'))[0], read(buffer('acc'))[0]
    value = acc + np.matmul(a, b, dtype=acc.dtype)
    at = buffer('acc')
    memory.store_buffer_content(*at, value, thread, logging_info=info)
    return kwargs['token']

  monkeypatch.setattr(
    gpu_callbacks, 'wgmma', gpu_callbacks.fail_on_exception(wgmma)
  )


def _run(case, config, *, races=False):
  """Result of the interpreted kernel."""
  f = functools.partial(
    pallas_gpu.ragged_paged_attention, **case['kwargs'], config=config
  )
  params = plgpu.InterpretGPUParams(detect_races=races)
  with plgpu.force_gpu_interpret_mode(params):
    out = jax.block_until_ready(jax.jit(f)(*case['args']))
  if races:
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    assert not interpret_pallas_call.get_races().races_found
  return out


def _errors(case, actual):
  """RMS error over RMS of the reference, for each result."""
  expected = reference.ragged_paged_attention(*case['args'], **case['kwargs'])
  found = []
  for a, e in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    a, e = (np.float32(x)[: case['valid']] for x in (a, e))
    np.testing.assert_array_equal(a[np.isinf(e)], e[np.isinf(e)])
    a, e = (x[np.isfinite(e)] for x in (a, e))
    found.append(np.sqrt(np.mean((a - e) ** 2) / np.mean(e**2)))
  return found


def _accepts(case):
  try:
    jax.eval_shape(
      functools.partial(pallas_gpu.ragged_paged_attention, **case['kwargs']),
      *case['args'],
    )
  except NotImplementedError:
    return False
  return True


def _case(**kwargs):
  return cases._case(jax.random.key(0), **(_SMALL | kwargs))


# Named, so that a case that is no longer accepted is missed.
_ACCEPTED = 'decode_bf16', 'chunks_bf16', 'mixed_fp8_bf16'


def test_cases_that_are_accepted():
  names = {n for n, f in cases.SMALL.items() if _accepts(f(jax.random.key(0)))}
  assert names == set(_ACCEPTED)


@needs_interpreter
@pytest.mark.parametrize('name', _ACCEPTED)
def test_equals_reference(name):
  case = cases.SMALL[name](jax.random.key(1))
  out = _run(case, dict(blocks=2), races=name == 'decode_bf16')
  assert max(_errors(case, out)) < _TOLERANCE
  assert all(np.isfinite(np.float32(x)).all() for x in jax.tree.leaves(out))


@needs_interpreter
def test_sequences_that_many_workers_share():
  """Parts of one tile in more blocks than are merged at a time."""
  case = _case(
    query_lens=(1, 1),
    kv_lens=(1700, 1),
    pages_per_seq=108,
    k=1,
    n=3,
    return_lse=True,
  )
  out = _run(case, dict(blocks=4, slots=3))
  assert max(_errors(case, out)) < _TOLERANCE


@needs_interpreter
def test_what_pages_have_past_the_end_is_not_read(monkeypatch):
  case = _case(query_lens=(1,), kv_lens=(70,), pages_per_seq=8)
  q, k, v, layer, start, length, table, *rest = case['args']
  slots = jnp.arange(16) + 16 * jnp.arange(8)[:, None]
  is_stale = (slots >= 70)[:, None, :, None]
  fill = lambda x: x.at[layer, table[0]].set(
    jnp.where(is_stale, jnp.nan, x[layer, table[0]])
  )
  args = (q, fill(k), fill(v), layer, start, length, table, *rest)
  assert max(_errors(case, _run(case | dict(args=args), dict(blocks=1)))) < (
    _TOLERANCE
  )
  monkeypatch.setattr(pallas_gpu_tile, '_clear_stale', lambda *_: None)
  out = _run(case | dict(args=args), dict(blocks=1))
  assert np.isnan(np.float32(out)).any()


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize(
  'kwargs',
  [
    dict(query_lens=(70, 5), kv_lens=(250, 5)),
    dict(query_lens=(50, 31, 1), kv_lens=(50, 150, 133), k=1, n=7),
    dict(query_lens=(4, 5, 3), kv_lens=(50, 5, 333)),
    dict(query_lens=(1, 1, 1), kv_lens=(50, 5, 133), n=128, k=1, page_size=8),
    dict(query_lens=(1, 0, 1), kv_lens=(9, 0, 300), pages='int8'),
    dict(
      query_lens=(150, 5),
      kv_lens=(250, 5),
      page_size=32,
      pages='float8_e4m3fn',
    ),
    dict(query_lens=(1, 0, 1), kv_lens=(9, 0, 300), h=256, k=1, window=30),
    dict(query_lens=(40, 30), kv_lens=(99, 30), h=256, k=1, n=8),
    dict(query_lens=(1, 1), kv_lens=(200, 333), page_size=128, h=128),
    dict(query_lens=(1, 1, 0, 1), kv_lens=(5, 333, 0, 129), part=1, window=90),
  ],
  ids=str,
)
def test_shapes(kwargs):
  pages_per_seq = 400 // kwargs.get('page_size', 16) + 1
  case = _case(pages_per_seq=pages_per_seq, return_lse=True, **kwargs)
  out = _run(case, dict(blocks=3), races=True)
  assert max(_errors(case, out)) < _TOLERANCE


@needs_interpreter
def test_fails_without_a_mask(monkeypatch):
  case = _case(query_lens=(1, 1), kv_lens=(37, 20), pages_per_seq=3)
  monkeypatch.setattr(pallas_gpu_tile, '_masked', lambda *args: args[-1])
  assert max(_errors(case, _run(case, dict(blocks=1)))) > 10 * _TOLERANCE


@needs_interpreter
@pytest.mark.slow
def test_fails_if_copies_do_not_wait(monkeypatch):
  """With more chunks than slots, one is overwritten while it is read."""
  case = _case(query_lens=(1,), kv_lens=(300,), pages_per_seq=20)

  class Hasty:
    barrier_wait = staticmethod(lambda *_: None)

    def __getattr__(self, name):
      return getattr(plgpu, name)

  monkeypatch.setattr(pallas_gpu_stream, 'plgpu', Hasty())
  with pytest.raises(Exception, match='RACE DETECTED'):
    _run(case, dict(blocks=1, slots=2), races=True)


_MODELS = {
  'decode': dict(query_lens=(1,) * 8, kv_lens=(2048,) * 8),
  'decode_page128': dict(
    query_lens=(1,) * 8, kv_lens=(2048,) * 8, page_size=128
  ),
  'prefill': dict(query_lens=(512,), kv_lens=(1024,)),
  'gemma': dict(query_lens=(512, 1), kv_lens=(1024, 9), n=16, k=8, h=256),
  'qwen': dict(query_lens=(1, 1), kv_lens=(1024, 9), n=28, k=4),
}


@pytest.mark.parametrize('name', [*_MODELS, *_ACCEPTED])
def test_lowers_for_cuda(name):
  if name in _MODELS:
    case = cases._abstract(**(dict(page_size=16) | _MODELS[name]))
  else:
    case = cases.SMALL[name](jax.random.key(0))
  f = functools.partial(pallas_gpu.ragged_paged_attention, **case['kwargs'])
  with pltpu.force_tpu_interpret_mode(None):
    traced = jax.jit(f).trace(*case['args'])
    lowered = traced.lower(lowering_platforms=('cuda',))
  assert lowered.as_text().count('custom_call @mosaic_gpu') == 2


@pytest.mark.parametrize(
  'kwargs, reason',
  [
    (dict(dtype='float32'), 'float32'),
    (dict(page_size=4), 'page_size=4'),
    (dict(h=32), 'head_dim=32'),
    (dict(pages='int4'), 'int4'),
    (dict(tree=True), 'tree'),
    (dict(part=0), 'over some pages'),
    (dict(k=1, pages='int8'), 'scales of 16 keys'),
  ],
)
def test_says_what_it_declines(kwargs, reason):
  kwargs = dict(query_lens=(3, 1), kv_lens=(20, 9), pages_per_seq=8) | kwargs
  case = _case(**kwargs)
  with pytest.raises(NotImplementedError, match=reason):
    pallas_gpu.ragged_paged_attention(*case['args'], **case['kwargs'])


@pytest.mark.parametrize('window', [None, 100])
@pytest.mark.parametrize('seed', range(4))
def test_work_is_every_chunk_once_in_equal_parts(seed, window):
  rng = np.random.default_rng(seed)
  queries = rng.choice([0, 1, 1, 5, 300], size=6)
  lengths = queries + rng.integers(0, 4000, 6) * (queries > 0)
  num_tokens = int(queries.sum()) + 3
  arrays = (
    jax.ShapeDtypeStruct((num_tokens, 8, 64), jnp.bfloat16),
    jax.ShapeDtypeStruct((1, 9, 2, 16, 64), jnp.bfloat16),
    jax.ShapeDtypeStruct((6, 300), jnp.int32),
  )
  plan = plan_lib.plan_for(hopper.Gpu('h200'), dict(blocks=7), *arrays)
  starts = np.concatenate([[0], np.cumsum(queries)])
  limit = None if window is None else jnp.int32(window)
  work, runs = plan_lib.work(plan, jnp.array(starts), jnp.array(lengths), limit)
  tiles = np.array(work).reshape(-1, len(plan_lib.FIELDS))
  runs = np.array(runs).reshape(-1, 2)
  found = []
  for tile, following in zip(tiles[:-1], tiles[1:], strict=True):
    number = dict(zip(plan_lib.FIELDS, tile, strict=True))
    count = following[-1] - number['start']
    for token in range(number['begin'], number['end'] if count else 0):
      if token >= starts[-1]:
        continue
      position = token + number['offset']
      first = 0 if window is None else max(position - window + 1, 0)
      chunks = range(first // plan.chunk, position // plan.chunk + 1)
      here = range(number['chunk'], number['chunk'] + count)
      assert set(chunks) <= set(here)
      found.append((token, number['unit']))
  expected = [(t, u) for t in range(starts[-1]) for u in range(plan.units)]
  assert sorted(found) == sorted(expected)
  sizes = np.diff(runs[:, 0])
  total = tiles[-1, -1]
  assert sizes.sum() == total and sizes.max() <= max(-(-total // len(sizes)), 4)
  for (begin, number), size in zip(runs[:-1], sizes, strict=True):
    if size:
      assert tiles[number, -1] <= begin < tiles[number + 1, -1]
