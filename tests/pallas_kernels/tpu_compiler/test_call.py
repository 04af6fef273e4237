"""A call without devices, put on other devices."""

import functools
import pickle

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from pallas_kernels.tpu_compiler import call as call_lib

_S = jax.ShapeDtypeStruct
_MESH = jax.make_mesh((2, 2), ('a', 'b'))
_X = _S((8, 4), np.float32)


def _add(x, y, n=1):
  return x + n * y


def _make(fn, args, axes=None, num_devices=4, static=None, **options):
  call = call_lib.make_call(fn, args, static or {}, num_devices, axes, options)
  return pickle.loads(pickle.dumps(call))


def _specs(args):
  return [a.sharding and a.sharding.spec for a in jax.tree.leaves(args)]


def test_shardings_of_arguments_move_to_the_new_devices():
  x = _S((8, 4), np.float32, sharding=NamedSharding(_MESH, P('a', 'b')))
  call = _make(_add, (x, _X))
  assert call.mesh_axes == {'a': 2, 'b': 2}
  devices = jax.devices()[4:8]
  fn, args = call(devices)
  assert _specs(args) == [P('a', 'b'), P()]
  assert args[0].sharding.device_set == set(devices)
  compiled = fn.lower(*args).compile()
  assert compiled.input_shardings[0][0].is_equivalent_to(args[0].sharding, 2)


def test_in_and_out_shardings():
  call = _make(
    _add,
    (_X, _X),
    {'a': 2, 'b': 2},
    in_shardings=(P('a'), NamedSharding(_MESH, P(None, 'b'))),
    out_shardings=P('b'),
  )
  fn, args = call(jax.devices()[:4])
  compiled = fn.lower(*args).compile()
  specs = [s.spec for s in compiled.input_shardings[0]]
  assert specs == [P('a'), P(None, 'b')]
  assert compiled.output_shardings.spec == P('b')


def test_options_of_a_jitted_function_are_kept():
  jitted = jax.jit(_add, donate_argnums=0, static_argnames='n')
  for args, static in (((_X, _X), {'n': 3}), ((_X, _X, 3), {})):
    fn, placed = _make(jitted, args, static=static)(jax.devices()[:4])
    lowered = fn.lower(*placed)
    donated = [info.donated for info in jax.tree.leaves(lowered.args_info)]
    assert donated[:2] == [True, False]
    x = np.ones((8, 4), np.float32)
    np.testing.assert_array_equal(lowered.compile()(x, 2 * x), 7 * x)


def test_shardings_of_a_jitted_function_are_kept():
  sharded = NamedSharding(_MESH, P('b'))
  jitted = jax.jit(_add, in_shardings=sharded, out_shardings=sharded)
  call = _make(jitted, (_X, _X))
  fn, args = call(jax.devices()[4:])
  compiled = fn.lower(*args).compile()
  assert [s.spec for s in compiled.input_shardings[0]] == [P('b'), P('b')]
  assert compiled.output_shardings.device_set == set(jax.devices()[4:])


def test_values_of_arrays_are_kept():
  table = np.arange(3)
  call = _make(_add, (_X, {'t': table}))
  unknown, known = call.values()
  assert unknown is None
  np.testing.assert_array_equal(known, table)
  assert known.dtype == np.int32


def test_mesh_has_all_devices_unless_told():
  assert _make(_add, (_X, _X)).mesh_axes == {'device': 4}
  fn, args = _make(_add, (_X, _X), {'a': 2})(jax.devices()[:4])
  assert args[0].sharding.device_set == set(jax.devices()[:2])


@pytest.mark.parametrize(
  'make, message',
  [
    (
      lambda: _make(jax.jit(_add), (_X, _X), donate_argnums=0),
      'donate_argnums: the function is jitted already',
    ),
    (lambda: _make(_add, (_X, _X), {'a': 8}), 'needs 8 devices.* has 4'),
    (
      lambda: _make(
        _add,
        (_S((8,), np.float32, sharding=NamedSharding(_MESH, P('a'))), _X),
        {'c': 4},
      ),
      'one mesh is needed',
    ),
    (
      lambda: _make(
        _add,
        (
          _S(
            (8,),
            np.float32,
            sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
          ),
          _X,
        ),
      ),
      'only named shardings',
    ),
  ],
)
def test_refuses(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_functions_without_a_name():
  fn, args = _make(functools.partial(_add, n=2), (_X, _X))(jax.devices()[:4])
  assert fn.lower(*args).compile()
