"""The TPU kernel of ragged_paged_attention, interpreted.

`tests/contracts/test_kernels.py` compares features; here are contents that are
known only when the kernel runs, and what goes on beside the numbers.
"""

import functools

import hypothesis
from hypothesis import strategies as st
import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import chip as chip_lib
from pallas_kernels.ragged_paged_attention import cases
from pallas_kernels.ragged_paged_attention import pallas_tpu
from pallas_kernels.ragged_paged_attention import pallas_tpu_plan
from pallas_kernels.ragged_paged_attention import reference

_S, _T, _M, _Z, _N, _K, _H = 3, 24, 32, 8, 4, 2, 16
# Several chunks in a sequence, several tiles in a run.
_CONFIG = dict(chunk_kib=1, rows=16)


def _arguments(query_lens, kv_lens, order):
  """A pool whose unused slots hold NaN; fixed shapes, so that jit is reused."""
  rng = np.random.default_rng(0)
  num_pages = _S * _M + 1
  table = order.permutation(num_pages)[: _S * _M].reshape(_S, _M)
  used = np.zeros((num_pages, _Z), bool)
  for s, length in enumerate(kv_lens):
    slots = np.arange(_M * _Z) < length
    used[table[s]] = slots.reshape(_M, _Z)
    # What follows a sequence's pages is no page's number.
    table[s, -(-length // _Z) :] = 2**30
  pool = rng.normal(size=(2, 1, num_pages, _K, _Z, _H)).astype(np.float32)
  pool[:] = np.where(used[:, None, :, None], pool, np.nan)
  q = rng.normal(size=(_T, _N, _H)).astype(np.float32)
  start = np.concatenate([[0], np.cumsum(query_lens)])
  return (
    jnp.array(q),
    *map(jnp.array, pool),
    jnp.int32(0),
    jnp.array(start, jnp.int32),
    jnp.array(kv_lens, jnp.int32),
    jnp.array(table, jnp.int32),
  )


def _expected(arguments, **kwargs):
  q, k, v, layer, start, kv_len, table, *rest = arguments
  table = jnp.minimum(table, k.shape[1] - 1)
  k, v = jnp.nan_to_num(k), jnp.nan_to_num(v)
  rest = [*rest, *(None,) * (5 - len(rest))]
  return reference.ragged_paged_attention(
    q, k, v, layer, start, kv_len, table, *rest, **kwargs
  )


_kernel = jax.jit(
  functools.partial(
    pallas_tpu.ragged_paged_attention, scale=0.25, config=_CONFIG
  )
)


@st.composite
def _batches(draw):
  """Queries and keys of each sequence."""
  query_lens, kv_lens, left = [], [], _T
  for _ in range(_S):
    count = draw(st.sampled_from([0, 1, 1, 2, 7, 8, 9, 20]))
    count = min(count, left)
    left -= count
    before = draw(st.sampled_from([0, 1, 7, 100, 127, 128, 200]))
    query_lens.append(count)
    kv_lens.append(count + before if count else draw(st.sampled_from([0, 5])))
  return query_lens, kv_lens, draw(st.integers(0, 2**16))


@hypothesis.given(_batches(), st.sampled_from([1, 9, 60, 130, 1000]))
# Shrinking would take minutes.
@hypothesis.settings(max_examples=12, phases=[hypothesis.Phase.generate])
def test_contents_are_known_only_at_run_time(batch, window):
  query_lens, kv_lens, seed = batch
  arguments = _arguments(query_lens, kv_lens, np.random.default_rng(seed))
  arguments = *arguments, jnp.int32(window)
  out = _kernel(*arguments)
  assert np.isfinite(out).all()
  valid = sum(query_lens)
  expected = _expected(arguments, scale=0.25, soft_cap=None)
  np.testing.assert_allclose(out[:valid], expected[:valid], atol=2e-5)


def test_no_races():
  arguments = _arguments([1, 17, 2], [200, 150, 3], np.random.default_rng(1))
  params = pltpu.InterpretParams(detect_races=True)
  with pltpu.force_tpu_interpret_mode(params):
    out = jax.jit(
      functools.partial(
        pallas_tpu.ragged_paged_attention, scale=0.25, config=_CONFIG
      )
    )(*arguments)
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  assert not interpret_pallas_call.races.races_found
  expected = _expected(arguments, scale=0.25, soft_cap=None)
  np.testing.assert_allclose(out[:20], expected[:20], atol=2e-5)


@pytest.mark.parametrize(
  'lens', [([1, 20, 1], [200, 40, 130]), ([24, 0, 0], [250, 0, 0])]
)
def test_two_cores_share_the_work(monkeypatch, lens):
  monkeypatch.setattr(
    chip_lib, 'current', lambda: chip_lib.Tpu('v5p', 56 * 2**20)
  )
  arguments = _arguments(*lens, np.random.default_rng(2))
  out = pallas_tpu.ragged_paged_attention(
    *arguments, scale=0.25, config=_CONFIG
  )
  valid = sum(lens[0])
  expected = _expected(arguments, scale=0.25, soft_cap=None)
  np.testing.assert_allclose(out[:valid], expected[:valid], atol=2e-5)


@pytest.mark.parametrize(
  'lens, feature, token',
  [
    (([1, 0, 0], [250, 0, 0]), 'window', 0),
    (([0, 1, 1], [0, 3, 250]), 'sinks', 1),
    (([1, 1, 1], [200, 129, 7]), 'lse', 1),
    (([17, 1, 0], [17, 250, 0]), 'lse', -1),
  ],
)
def test_two_cores_share_the_keys_of_a_long_decode(
  monkeypatch, lens, feature, token
):
  monkeypatch.setattr(
    chip_lib, 'current', lambda: chip_lib.Tpu('v5p', 56 * 2**20)
  )
  parts = []
  merge = pallas_tpu._with_shared_decode
  spy = lambda *args: parts.append(args[-1]) or merge(*args)
  monkeypatch.setattr(pallas_tpu, '_with_shared_decode', spy)
  arguments = _arguments(*lens, np.random.default_rng(5))
  if feature == 'window':
    arguments = *arguments, jnp.int32(190)
  elif feature == 'sinks':
    arguments = *arguments, None, jnp.array([3.0, -50.0, 0.0, 60.0])
  kwargs = dict(scale=0.25, soft_cap=None, return_lse=feature == 'lse')
  out = pallas_tpu.ragged_paged_attention(*arguments, **kwargs, config=_CONFIG)
  assert (parts[0][:, pallas_tpu.decode.TOKEN_LANE] == token).all()
  valid = sum(lens[0])
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x[:valid], y[:valid], atol=2e-5),
    out,
    _expected(arguments, **kwargs),
  )


def test_inside_shard_map():
  arguments = _arguments([1, 9, 1], [20, 9, 130], np.random.default_rng(3))
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((2,), ('tensor',), axis_types=auto)
  heads = jax.P(None, 'tensor', None)
  pool = jax.P(None, None, 'tensor')
  out = jax.jit(
    jax.shard_map(
      functools.partial(
        pallas_tpu.ragged_paged_attention, scale=0.25, config=_CONFIG
      ),
      mesh=mesh,
      in_specs=(heads, pool, pool, *(jax.P(),) * 4),
      out_specs=heads,
    )
  )(*arguments)
  expected = _expected(arguments, scale=0.25, soft_cap=None)
  np.testing.assert_allclose(out[:11], expected[:11], atol=2e-5)


def test_appends_before_it_attends():
  query_lens, kv_lens = [1, 20, 1], [9, 40, 130]
  arguments = _arguments(query_lens, kv_lens, np.random.default_rng(4))
  q, k, v, layer, start, kv_len, table = arguments
  # A pool without the new keys, and what they were.
  rows = [
    (seq, length - count + i)
    for seq, (count, length) in enumerate(zip(query_lens, kv_lens, strict=True))
    for i in range(count)
  ]
  seq, position = np.array(rows + [rows[-1]] * (_T - len(rows))).T
  at = 0, np.array(table)[seq, position // _Z], slice(None), position % _Z
  k_new, v_new = k[at], v[at]
  old = [x.at[at].set(jnp.nan) for x in (k, v)]
  out, k_out, v_out, *_ = jax.jit(
    functools.partial(pallas_tpu.append_and_attend, scale=0.25, config=_CONFIG)
  )(q, k_new, v_new, *old, layer, start, kv_len, table)
  np.testing.assert_array_equal(k_out, k)
  np.testing.assert_array_equal(v_out, v)
  expected = _expected(arguments, scale=0.25, soft_cap=None)
  np.testing.assert_allclose(out[:22], expected[:22], atol=2e-5)


@pytest.mark.parametrize('name', ['v4', 'v5e', 'v5p', 'v6e', 'tpu7x'])
@pytest.mark.parametrize('case', cases.TPU)
def test_plans_fit_the_memory(name, case):
  mib = {'v4': 14, 'v5e': 112, 'v5p': 56, 'v6e': 112, 'tpu7x': 56}[name]
  chip = chip_lib.Tpu(name, mib * 2**20)
  args = cases.TPU[case]()['args']
  plan = pallas_tpu_plan.plan_for(chip, {}, args[0], args[1], args[6])
  dtype = args[0].dtype
  assert pallas_tpu_plan.vmem_bytes(plan, dtype, dtype) < chip.vmem_bytes
  assert plan.chunk >= 128 and plan.queries >= 8


def test_refuses_what_does_not_fit_tiles():
  arguments = _arguments([1, 1, 1], [1, 1, 1], np.random.default_rng(0))
  q, k, v, *rest = arguments
  with pytest.raises(NotImplementedError, match='page_size=3'):
    pallas_tpu.ragged_paged_attention(
      q, k[:, :, :, :3], v[:, :, :, :3], *rest, scale=1.0
    )
