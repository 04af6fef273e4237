"""The fused TPU backward against gradients of the reference in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import chip
from pallas_kernels.flash_attention import backward_tiles
from pallas_kernels.flash_attention import pallas_tpu_backward
from pallas_kernels.flash_attention import reference

# Three blocks of queries and of keys, the last one padded.
_BLOCKS = dict(block_q=128, chunk=128, sub=128, unroll=2)
_T = 300


def _arrays(b=1, t=_T, n=2, k=1, h=16, dtype='float32'):
  kq, kk, kv, ko, kl = jax.random.split(jax.random.key(0), 5)
  normal = jax.random.normal
  return (
    normal(kq, (b, t, n, h), dtype),
    normal(kk, (b, t, k, h), dtype),
    normal(kv, (b, t, k, h), dtype),
    normal(ko, (b, t, n, h), dtype),
    normal(kl, (b, n, t)),
  )


def _rms(x):
  return float(jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)))))


def _check(
  *,
  window=None,
  soft_cap=None,
  segments=None,
  sinks=None,
  positions=(None, None),
  config=_BLOCKS,
  tolerance=1e-5,
  **shape,
):
  """Compares all gradients; returns those of q, k and v."""
  q, k, v, d_out, d_lse = _arrays(**shape)
  rest = (
    segments,
    None if window is None else jnp.int32(window),
    sinks,
    *positions,
  )
  static = dict(scale=q.shape[-1] ** -0.5, soft_cap=soft_cap)

  def attend(q, k, v, sinks):
    return reference.flash_attention(
      q, k, v, *rest[:2], sinks, *rest[3:], **static
    )

  as_f32 = [x.astype(jnp.float32) for x in (q, k, v)]
  (out, lse), vjp = jax.vjp(attend, *as_f32, sinks)
  expected = vjp((d_out.astype(jnp.float32), d_lse))
  backward = functools.partial(
    pallas_tpu_backward.flash_attention_backward, config=config, **static
  )
  actual = jax.jit(backward)(
    q, k, v, *rest, out.astype(q.dtype), lse, d_out, d_lse
  )
  for name, a, e in zip('qkvs', actual, expected, strict=True):
    if e is None:
      assert a is None
      continue
    assert a.shape == e.shape
    assert _rms(a - e) <= tolerance * _rms(e), name
  assert [x.dtype for x in actual[:3]] == [q.dtype] * 3
  return actual[:3]


def _segments(b=1):
  return jnp.asarray(np.repeat([[3, 4, 7]] * b, [140, 20, 140], axis=1))


def test_causal_with_grouped_queries():
  _check(b=2, n=4, k=2, h=24)


def test_bfloat16():
  _check(dtype='bfloat16', h=64, tolerance=1e-2)


def test_head_dim_that_is_no_power_of_two():
  _check(n=1, h=96)


def test_window_smaller_and_larger_than_a_block():
  _check(window=37)
  _check(window=150)


def test_segments_with_soft_cap():
  _check(segments=_segments(), soft_cap=2.0)


def test_sinks():
  _check(sinks=jnp.array([0.5, -2.0]))


def test_a_length_of_one():
  _check(t=1, sinks=jnp.array([0.5, -2.0]))


def test_blocks_wider_than_chunks():
  _check(config=dict(block_q=256, chunk=128, sub=64, unroll=1), window=200)


def test_positions_of_two_shards_of_a_stripe():
  index = jnp.arange(_T, dtype=jnp.int32)[None]
  _check(positions=(2 * index, 2 * index + 1), window=260)


def test_everything_at_once_over_several_runs():
  i = jax.random.permutation(jax.random.key(7), _T).astype(jnp.int32)[None]
  _check(
    positions=(i, i),
    segments=_segments(),
    soft_cap=2.0,
    sinks=jnp.array([0.5, -2.0]),
    window=200,
    config=dict(_BLOCKS, run=128),
  )


def test_window_over_several_runs():
  _check(n=1, window=120, config=dict(_BLOCKS, run=256))


def test_both_cores_share_one_kv_head(monkeypatch):
  monkeypatch.setattr(chip, 'current', lambda: chip.Tpu('v5p', 56 * 2**20))
  _check(n=4, segments=_segments())


@pytest.mark.parametrize('sinks', [None, jnp.array([0.5, -2.0])])
def test_queries_without_keys_have_zero_gradients(sinks):
  index = jnp.arange(_T, dtype=jnp.int32)[None]
  dq, dk, dv = _check(positions=(index, index + 40), sinks=sinks)
  assert not np.any(dq[:, :40])
  assert not np.any(dk[:, -40:]) and not np.any(dv[:, -40:])


def test_visits_are_the_tiles_with_work():
  rng = np.random.default_rng(0)
  size, block, chunk, run_chunks = 96, 16, 8, 4
  i, j = (rng.permutation(size)[None] // 2 for _ in 'ij')
  segments = np.sort(rng.integers(0, 3, (1, size)))
  window = 30
  behind = i[0][:, None] - j[0][None]
  same = segments[0][:, None] == segments[0][None]
  sees = (behind >= 0) & (behind < window) & same
  tiles = sees.reshape(size // block, block, size // chunk, chunk)
  order, counts, fetch = backward_tiles.visits(
    (jnp.asarray(i), jnp.asarray(j)),
    (jnp.asarray(segments),) * 2,
    jnp.int32(window),
    block_q=block,
    chunk=chunk,
    run_chunks=run_chunks,
    has_diagonal=False,
  )
  runs, blocks = size // chunk // run_chunks, size // block
  order = np.array(order).reshape(runs, blocks, run_chunks)
  counts = np.array(counts).reshape(runs, blocks, 2)
  for run in range(runs):
    for row in range(blocks):
      whole, visited = counts[run, row]
      listed = order[run, row] + run * run_chunks
      assert tiles[row][:, listed[:whole]].all()
      assert not tiles[row][:, listed[visited:]].any()
    # The ends are there in any case.
    works = counts[run, :, 1] > 0
    works[[0, 1, -2, -1]] = True
    at = np.reshape(fetch, (runs, blocks))[run]
    assert (at[works] == np.flatnonzero(works)).all()
    assert works[at].all()


def test_only_tiles_of_the_window_are_listed_and_half_of_a_causal_square():
  index = jnp.arange(1024, dtype=jnp.int32)[None]
  for window, whole, masked in ((2**30, 28, 0), (257, 7, 6), (128, 0, 7)):
    _, counts, _ = backward_tiles.visits(
      (index, index),
      None,
      jnp.int32(window),
      block_q=128,
      chunk=128,
      run_chunks=8,
      has_diagonal=True,
    )
    each = np.reshape(counts, (-1, 2))
    assert each[:, 0].sum() == whole
    assert (each[:, 1] - each[:, 0]).sum() == masked


def test_candidates_are_configurations_it_takes():
  q, k, v, d_out, d_lse = _arrays(t=1024)
  args = (q, k, v, None, None, None, None, None, d_out, d_lse, d_out, d_lse)
  static = dict(scale=1.0, soft_cap=None)
  features = pallas_tpu_backward.backward_features(*args, **static)
  assert features['length'] == 1024 and features['group'] == 2
  candidates = pallas_tpu_backward.backward_candidates('v5e', *args, **static)
  assert candidates
  for config in candidates:
    jax.eval_shape(
      functools.partial(
        pallas_tpu_backward.flash_attention_backward, config=config, **static
      ),
      *args,
    )


def test_what_it_cannot_do():
  q, k, v, d_out, d_lse = _arrays(t=8, h=320)
  args = (q, k, v, None, None, None, None, None, d_out, d_lse, d_out, d_lse)
  backward = functools.partial(
    pallas_tpu_backward.flash_attention_backward, scale=1.0, soft_cap=None
  )
  with pytest.raises(NotImplementedError, match='320'):
    backward(*args)
  with pytest.raises(NotImplementedError, match='float16'):
    q, k, v, d_out, d_lse = _arrays(t=8, dtype='float16')
    backward(q, k, v, *args[3:8], d_out, d_lse, d_out, d_lse)
