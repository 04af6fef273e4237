"""Copies on the host are whole, whatever becomes of the originals."""

import threading

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from jaxtrain.checkpoints import staging


def _sharded(value):
  mesh = jax.make_mesh((8,), ('x',))
  return jax.device_put(value, NamedSharding(mesh, P('x')))


def test_a_donated_array_does_not_tear_its_copy():
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = _sharded(np.zeros(1 << 22, np.float32))
  for i in range(5):
    copy = staging.to_host({'x': x})['x']
    x = add(x)
    np.testing.assert_array_equal(np.asarray(copy), i)


def test_keeps_structure_shards_and_what_is_no_array():
  state = {
    'a': _sharded(np.arange(16.0)),
    'key': jax.random.key(3),
    'n': np.arange(3),
  }
  copy = staging.to_host(state)
  assert copy['a'].sharding.memory_kind == 'pinned_host'
  assert copy['a'].sharding.spec == P('x')
  np.testing.assert_array_equal(np.asarray(copy['a']), np.arange(16.0))
  np.testing.assert_array_equal(
    np.asarray(copy['key']), jax.random.key_data(state['key'])
  )
  assert copy['n'] is state['n']


def test_what_many_devices_hold_is_copied_once():
  mesh = jax.make_mesh((2, 4), ('a', 'b'))
  value = np.arange(48.0, dtype=np.float32).reshape(6, 8)
  for spec, num_bytes in [
    (P(), value.nbytes),
    (P('a'), value.nbytes),
    (P(None, 'b'), value.nbytes),
    (P('a', 'b'), value.nbytes),
    # Neither 3 nor 1 divides into the four parts of b: four copies.
    (P('a', None), value[:, :1].nbytes * 4),
  ]:
    part = value[:, :1] if num_bytes != value.nbytes else value
    x = jax.device_put(part, NamedSharding(mesh, spec))
    copy = staging.to_host([x])[0]
    assert sum(s.data.nbytes for s in copy.addressable_shards) == num_bytes
    np.testing.assert_array_equal(np.asarray(copy), part)


def test_splitting_replicas_needs_no_communication():
  mesh = jax.make_mesh((2, 4), ('a', 'b'))
  x = jax.ShapeDtypeStruct(
    (8, 16), np.float32, sharding=NamedSharding(mesh, P('b'))
  )
  wanted = staging.host_sharding(x)
  assert wanted.spec == P(('b', 'a'), None)
  program = jax.jit(
    lambda x: x, out_shardings=wanted.with_memory_kind('device')
  )
  text = program.lower(x).compile().as_text()
  assert 'collective' not in text and 'all-' not in text


def _arrays(count=6):
  return [(f'x{i}', _sharded(np.full(64, i, np.float32))) for i in range(count)]


def test_budget_is_kept_and_the_tail_waited_for():
  area = staging.Staging(3 * 256)
  groups = area.start(_arrays())
  assert area.used_bytes == 3 * 256 and len(groups) == 6
  waited = []
  waiter = threading.Thread(target=lambda: waited.append(area.wait_copied()))
  waiter.start()
  for i, group in enumerate(groups):
    assert (i < 3) == (not waited)
    (copy,) = area.take(group)
    np.testing.assert_array_equal(np.asarray(copy), i)
    assert area.used_bytes <= area.peak_bytes == 3 * 256
    area.release(group)
    if i == 2:
      waiter.join(10)
  assert area.used_bytes == 0 and waited and waited[0] > 0


def test_what_is_given_up_frees_its_room_and_those_who_wait():
  area = staging.Staging(512)
  for group in reversed(area.start(_arrays())):
    area.release(group)
  assert area.used_bytes == 0 and area.wait_copied() < 1


def test_originals_that_are_gone_are_an_error_not_a_deadlock():
  area = staging.Staging(512)
  arrays = _arrays(3)
  groups = area.start(arrays)
  arrays[2][1].delete()  # As donation without wait_copied would.
  area.release(groups[0])
  with pytest.raises(RuntimeError, match='deleted'):
    area.take(groups[2])


def test_one_array_above_the_budget():
  with pytest.raises(ValueError, match=r'x0 takes .* more than .*staging_gib'):
    staging.Staging(255).start(_arrays())
  with pytest.raises(ValueError, match='budget_bytes=0'):
    staging.Staging(0)
