"""A state comes back from keepers bit for bit, whatever is lost of them.

Eight simulated devices in one process, whose parts go to keepers in processes
of their own or, where a test looks into them, in threads.
"""

import dataclasses
import gc
import itertools
import json
import logging
import os
import pathlib
import signal
import socket
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.checkpoints.in_memory import checksums
from jaxtrain.checkpoints.in_memory import reader
from jaxtrain.checkpoints.in_memory.keeper import Keeper
from jaxtrain.checkpoints.in_memory.keeper import KeeperProcess
from jaxtrain.checkpoints.in_memory.snapshots import InMemorySnapshots

_MESHES = {
  'fsdp=4,tensor=2': ((4, 2), ('x', 'y')),
  'other': ((2,), ('y',)),
  'all': ((8,), ('x',)),
}


@pytest.fixture
def keepers():
  started = [KeeperProcess(idle_exit_s=120) for _ in range(4)]
  yield started
  for keeper in started:
    keeper.kill()


@pytest.fixture
def threads():
  started = [Keeper() for _ in range(4)]
  yield started
  for keeper in started:
    keeper.close()


def _addresses(keepers):
  return [k.address for k in keepers]


def _mesh(name):
  shape, axes = _MESHES[name]
  devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
  return jax.sharding.Mesh(devices, axes)


def _put(mesh, value, *axes):
  axes = [a if a in mesh.axis_names else None for a in axes]
  return jax.device_put(value, jax.sharding.NamedSharding(mesh, jax.P(*axes)))


def _state(seed, mesh='fsdp=4,tensor=2', fill=None):
  """Shards, replicas, a tree of optax, keys, scalars, every kind of number."""
  mesh = _mesh(mesh)
  rng = np.random.default_rng(seed)

  def numbers(*shape, dtype=np.float32):
    if fill is not None:
      return np.full(shape, fill, dtype)
    return rng.integers(-100, 100, shape).astype(dtype)

  params = {
    'w': _put(mesh, numbers(64, 512), 'x', 'y'),
    'half': _put(mesh, numbers(8, 6, 10, dtype=jnp.bfloat16), None, 'y'),
    'shared': _put(mesh, numbers(128, 256)),
  }
  return {
    'params': params,
    'opt_state': optax.adamw(1e-3).init(params),
    'step': _put(mesh, np.int32(seed)),
    'key': _put(mesh, jax.random.key(seed)),
    'keys': _put(mesh, jax.random.split(jax.random.key(seed), 8), 'x'),
    'flags': _put(mesh, numbers(3, 5) > 0),
    'bytes': _put(mesh, numbers(7, dtype=np.uint8)),
    'empty': _put(mesh, np.zeros((0, 4), np.float32)),
    'host': numbers(5, dtype=np.int64),
    'count': 17,
  }


def _raw(x):
  if isinstance(x, jax.Array) and jax.dtypes.issubdtype(
    x.dtype, jax.dtypes.prng_key
  ):
    x = jax.random.key_data(x)
  return np.asarray(x)


def _assert_same(have, want):
  assert jax.tree.structure(have) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
    assert _raw(a).dtype == _raw(b).dtype
    assert _raw(a).shape == _raw(b).shape
    assert _raw(a).tobytes() == _raw(b).tobytes()
    if isinstance(b, jax.Array):
      assert a.sharding == b.sharding


@pytest.mark.parametrize('num_parity', [1, 2])
def test_any_loss_and_any_mesh(keepers, num_parity):
  with InMemorySnapshots(_addresses(keepers), num_parity) as snapshots:
    for step in (3, 4, 9):
      assert snapshots.save(
        step, _state(step), data_state={'at': step}, metadata={'run': 'a'}
      )
    snapshots.wait()
    assert snapshots.steps() == [4, 9]
    assert (snapshots.saved, snapshots.failed) == (3, 0)
    assert snapshots.absent == {}
    # Read as if these were not there; really killed below.
    (newest, *_), _ = reader.find(_addresses(keepers), 10)
    for lost in itertools.combinations(range(4), num_parity):
      without = dataclasses.replace(
        newest,
        has_data=newest.has_data - set(lost),
        has_parity=newest.has_parity - set(lost),
        missing=dict.fromkeys(lost, 'lost'),
      )
      assert without.why_not() is None
      with reader.Reader(without, 10) as source:
        source.fetch(
          {i: [(0, h['num_bytes'])] for i, h in source.headers.items()}
        )
        for i, header in source.headers.items():
          start = 0
          for sums in header['checksums']:
            chunk = source.data[i][start : start + newest.group.chunk_bytes]
            assert checksums.of_chunk(chunk) == sums
            start += chunk.size
    for keeper in keepers[1 : 1 + num_parity]:
      keeper.kill()
    assert snapshots.steps() == [4, 9]
    for mesh in _MESHES:
      want = _state(9, mesh)
      state, data_state, metadata = snapshots.restore(_state(0, mesh))
      _assert_same(state, want)
      assert (data_state, metadata) == ({'at': 9}, {'run': 'a'})
    state, data_state, _ = snapshots.restore(_state(0), step=4)
    _assert_same(state, _state(4))
    assert data_state == {'at': 4}
    keepers[0].kill()
    assert snapshots.steps() == []
    with pytest.raises(ValueError) as error:
      snapshots.restore(_state(0), step=9)
    for keeper in keepers[: 1 + num_parity]:
      assert keeper.address in str(error.value)
    assert 'step 9: ' in str(error.value)


def test_donation_and_writes_do_not_tear_a_snapshot(keepers):
  bump = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  mesh = _mesh('all')
  state = {'w': _put(mesh, np.zeros((8, 1 << 16), np.float32), 'x')}
  host = np.zeros(1000, np.int64)
  with InMemorySnapshots(_addresses(keepers)) as snapshots:
    for step in range(1, 8):
      state = bump(state)
      host += 1
      snapshots.save(step, {**state, 'host': host})
    host += 1
    snapshots.wait()
    for step in snapshots.steps():
      restored, _, _ = snapshots.restore({**state, 'host': host}, step=step)
      np.testing.assert_array_equal(restored['w'], step)
      np.testing.assert_array_equal(restored['host'], step)
    assert snapshots.steps()[-1] == 7


def test_a_keeper_that_dies_is_done_without_until_it_is_back(keepers, caplog):
  with InMemorySnapshots(_addresses(keepers), 2, timeout_s=20) as snapshots:
    snapshots.save(1, _state(1))
    snapshots.wait()
    dead = keepers[2]
    dead.kill()
    for step in (2, 3):
      snapshots.save(step, _state(step))
      snapshots.wait()
      assert list(snapshots.absent) == [dead.address]
    assert snapshots.failed == 0
    assert any(dead.address in r.getMessage() for r in caplog.records)
    # One more may go now, though the third has nothing.
    keepers[0].kill()
    _assert_same(snapshots.restore(_state(0))[0], _state(3))
    host, port = dead.address.split(':')
    keepers[2] = KeeperProcess(host, int(port), idle_exit_s=120)
    host, port = keepers[0].address.split(':')
    keepers[0] = KeeperProcess(host, int(port), idle_exit_s=120)
    snapshots.save(4, _state(4))
    snapshots.wait()
    assert snapshots.absent == {}
    for keeper in (keepers[1], keepers[3]):
      keeper.kill()
    _assert_same(snapshots.restore(_state(0))[0], _state(4))


def test_a_keeper_that_hangs_does_not_hang_the_trainer(keepers):
  with InMemorySnapshots(_addresses(keepers), timeout_s=1) as snapshots:
    snapshots.save(1, _state(1))
    snapshots.wait()
    hung = keepers[3].process.pid
    os.kill(hung, signal.SIGSTOP)
    try:
      start = time.monotonic()
      snapshots.save(2, _state(2))
      snapshots.wait()
      snapshots.save(3, _state(3))
      snapshots.wait()
      assert time.monotonic() - start < 40
      assert keepers[3].address in snapshots.absent
      state, _, _ = snapshots.restore(_state(0))
      assert int(state['step']) in (1, 2, 3)
      _assert_same(state, _state(int(state['step'])))
    finally:
      os.kill(hung, signal.SIGCONT)


def test_a_smaller_group_reads_what_the_larger_saved(keepers):
  with InMemorySnapshots(_addresses(keepers)) as snapshots:
    for step in (5, 6):
      snapshots.save(step, _state(step), data_state=step)
    snapshots.wait()
  keepers[1].kill()
  fewer = [k.address for i, k in enumerate(keepers) if i != 1]
  with InMemorySnapshots(fewer, 1) as snapshots:
    assert snapshots.steps() == [5, 6]
    state, data_state, _ = snapshots.restore(_state(0, 'other'))
    _assert_same(state, _state(6, 'other'))
    assert data_state == 6
    # Back to an older step: the new step 6 is another.
    snapshots.save(6, _state(60, 'other'))
    snapshots.wait()
    assert snapshots.steps() == [6]
    _assert_same(snapshots.restore(_state(0))[0], _state(60))
  # And grows again: the new keeper has nothing yet.
  with (
    _closing(KeeperProcess(idle_exit_s=120)) as new,
    InMemorySnapshots([*fewer, new.address], 2) as snapshots,
  ):
    _assert_same(snapshots.restore(_state(0))[0], _state(60))
    snapshots.save(7, _state(7))
    snapshots.save(8, _state(8))
    snapshots.wait()
    assert snapshots.steps() == [7, 8]
    keepers[0].kill()
    keepers[3].kill()
    _assert_same(snapshots.restore(_state(0))[0], _state(8))


class _closing:
  def __init__(self, keeper):
    self._keeper = keeper

  def __enter__(self):
    return self._keeper

  def __exit__(self, *error):
    self._keeper.kill()


@pytest.mark.parametrize('lost', [None, 1])
def test_damaged_memory_is_noticed_and_mended(
  threads, monkeypatch, lost, caplog
):
  monkeypatch.setattr(checksums, 'BLOCK_BYTES', 4096)
  with InMemorySnapshots(_addresses(threads), 2) as snapshots:
    snapshots.save(1, _state(1))
    snapshots.wait()
    (version,) = threads[0].versions._versions.values()
    used = version.headers[0]['num_bytes']
    assert used > 3 * 4096
    for place in (0, 5000, used - 1):
      version.slot.bytes[place] ^= 0x10
    if lost is not None:
      threads[lost].close()
    caplog.set_level(logging.WARNING)
    _assert_same(snapshots.restore(_state(0))[0], _state(1))
    damaged = [r for r in caplog.records if 'was damaged' in r.getMessage()]
    assert len(damaged) == 3
    # Parity too: it is then not used.
    (other,) = threads[2].versions._versions.values()
    for row in other.rows:
      row.bytes[:] ^= 1
    if lost is None:
      _assert_same(snapshots.restore(_state(0))[0], _state(1))
    else:
      with pytest.raises(ValueError, match='snapshot of step 1 has lost') as e:
        snapshots.restore(_state(0))
      assert threads[0].address in str(e.value)
      assert threads[2].address in str(e.value)


def test_memory_is_used_again_and_old_versions_go(threads):
  gc.collect()
  before = _count_slots()
  with InMemorySnapshots(_addresses(threads)) as snapshots:
    counts = []
    for step in range(12):
      snapshots.save(step, _state(step, 'all'))
      snapshots.wait()
      counts.append(_count_slots() - before)
    # Two versions and one being written, each bytes and a row of parity.
    assert set(counts[4:]) == {4 * 3 * 2}
  for keeper in threads:
    held = keeper.versions.describe()
    assert [v['version'][1] for v in held] == [10, 11]
    assert all(v['committed'] for v in held)
    keeper.close()
  del snapshots
  gc.collect()
  assert _count_slots() == before


def _count_slots():
  """Different mapped files; a trainer here has its own mapping of some."""
  lines = pathlib.Path('/proc/self/maps').read_text().splitlines()
  return len({x.split()[4] for x in lines if 'memfd:snapshot' in x})


def test_replicas_are_kept_once(threads):
  mesh = _mesh('all')
  state = {
    'replicated': _put(mesh, np.zeros((1 << 10, 256), np.float32)),
    'sharded': _put(mesh, np.zeros((8, 1 << 15), np.float32), 'x'),
  }
  num_bytes = sum(x.nbytes for x in state.values())
  with InMemorySnapshots(_addresses(threads), 2) as snapshots:
    snapshots.save(0, state)
    snapshots.wait()
  headers = threads[0].versions.find(_only_id(threads[0])).headers
  sizes = [h['num_bytes'] for h in headers.values()]
  assert sum(sizes) == num_bytes
  # And spread evenly, so that no chunk is longer than it must be.
  assert max(sizes) == min(sizes) == num_bytes // 4


def _only_id(keeper):
  (described,) = keeper.versions.describe()
  return tuple(described['version'])


def test_busy(threads, monkeypatch):
  with InMemorySnapshots(_addresses(threads), when_busy='skip') as snapshots:
    slow = snapshots._writer.write
    monkeypatch.setattr(
      snapshots._writer, 'write', lambda *a: (time.sleep(0.5), slow(*a))[1]
    )
    assert snapshots.save(1, _state(1))
    assert not snapshots.save(2, _state(2))
    snapshots.wait()
    assert snapshots.save(3, _state(3))
    assert snapshots.steps() == [1, 3]
    assert snapshots.blocked_s < 0.2
  with InMemorySnapshots(_addresses(threads)) as snapshots:
    monkeypatch.setattr(
      snapshots._writer, 'write', lambda *a: time.sleep(0.5) or _COMMITTED
    )
    snapshots.save(1, _state(1))
    snapshots.save(2, _state(2))
    assert snapshots.blocked_s > 0.3


_COMMITTED = {'is_committed': True, 'absent': {}, 'reason': None}


def test_what_is_wrong_is_named(threads, tmp_path):
  addresses = _addresses(threads)
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    nobody = f'127.0.0.1:{s.getsockname()[1]}'
  for arguments, message in [
    (dict(keepers=['here']), "'here' is not of the form host:port"),
    (dict(keepers=addresses[:1] * 2), 'names one twice'),
    (dict(keepers=addresses, num_parity=4), 'num_parity=4 must be'),
    (dict(keepers=addresses, num_parity=0), 'num_parity=0 must be'),
    (dict(keepers=addresses, when_busy='drop'), "when_busy='drop'"),
    (dict(keepers=addresses, timeout_s=0), 'timeout_s=0'),
    (
      dict(keepers=[nobody, '127.0.0.1:1']),
      f'no keeper answers: .*127.0.0.1:1 .*{nobody}',
    ),
  ]:
    with pytest.raises(ValueError, match=message):
      InMemorySnapshots(**arguments)
  path = tmp_path / 'group.json'
  path.write_text(json.dumps({'keepers': addresses, 'num_parity': 2}))
  with InMemorySnapshots.from_file(path, timeout_s=5) as snapshots:
    with pytest.raises(ValueError, match='no snapshot'):
      snapshots.restore(_state(0))
    with pytest.raises(ValueError, match='step=-1'):
      snapshots.save(-1, _state(0))
    with pytest.raises(ValueError, match='data_state is not JSON'):
      snapshots.save(1, _state(0), data_state=object())
    snapshots.save(2, _state(2))
    with pytest.raises(ValueError, match='no snapshot of step 1; .*step 2'):
      snapshots.restore(_state(0), step=1)
    other = _state(0)
    other['params']['w'] = jnp.zeros((64, 256))
    other['more'] = other.pop('flags')
    with pytest.raises(ValueError, match='step 2 does not fit the state') as e:
      snapshots.restore(other)
    assert 'params/w has shape (64, 512), wanted (64, 256)' in str(e.value)
    assert 'it lacks more' in str(e.value)
    snapshots.save(2, _state(2))
    with pytest.raises(ValueError, match='step 2 does not come after'):
      snapshots.wait()
  path.write_text('{"keeper": []}')
  with pytest.raises(ValueError, match='group.json'):
    InMemorySnapshots.from_file(path)
