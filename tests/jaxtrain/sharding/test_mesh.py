"""Meshes from descriptions: sizes, device order, and every refusal."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxtrain.sharding import AXES
from jaxtrain.sharding import make_mesh
from jaxtrain.sharding import simulate_devices


@dataclasses.dataclass(frozen=True)
class _Device:
  """What the mesh code reads of a device."""

  id: int
  slice_index: int = 0
  process_index: int = 0
  platform: str = 'cpu'
  device_kind: str = 'cpu'


def _sizes(mesh):
  return {a: n for a, n in mesh.shape.items() if n > 1}


def _ids(mesh):
  return np.vectorize(lambda d: d.id)(mesh.devices)


@pytest.mark.parametrize(
  'spec, expected',
  [
    ('', {}),
    ('data=2,fsdp=2,tensor=2', dict(data=2, fsdp=2, tensor=2)),
    ('tensor=2, data=4', dict(data=4, tensor=2)),
    ('fsdp=-1', dict(fsdp=8)),
    ('fsdp=-1,tensor=4', dict(fsdp=2, tensor=4)),
    ('data=-1,tensor=8', dict(tensor=8)),
    ('context=2,expert=2,stage=2', dict(context=2, expert=2, stage=2)),
    ('tensor=3', dict(tensor=3)),
  ],
)
def test_sizes(spec, expected):
  mesh = make_mesh(spec)
  assert mesh.axis_names == AXES
  assert _sizes(mesh) == expected
  used = len(set(mesh.devices.flat))
  assert used == mesh.size == np.prod(list(expected.values()))


@pytest.mark.parametrize(
  'spec, message',
  [
    ('model=2', "unknown axis 'model'; known: stage, data, fsdp"),
    ('data', "data='' must be a positive integer or -1"),
    ('data=two', "data='two' must be"),
    ('data=0', "data='0' must be"),
    ('data=-2', "data='-2' must be"),
    ('data=2.0', "data='2.0' must be"),
    ('data=2,data=2', "axis 'data' is given twice"),
    ('data=-1,fsdp=-1', 'only one axis may be -1'),
    ('data=4,tensor=4', 'needs 16 devices, but there are 8'),
    ('data=-1,tensor=3', '3 does not divide the 8 devices'),
  ],
)
def test_refused(spec, message):
  with pytest.raises(ValueError, match=message):
    make_mesh(spec)


def test_tensor_axis_is_the_fastest():
  ids = _ids(make_mesh('data=2,tensor=4')).reshape(2, 4)
  np.testing.assert_array_equal(ids, np.arange(8).reshape(2, 4))


@pytest.mark.parametrize('outer', ['data=2', 'fsdp=2', 'stage=2', 'tensor=2'])
def test_hybrid_keeps_slices_together(outer):
  mesh = make_mesh('data=2,tensor=2', across_slices=outer)
  name = outer.partition('=')[0]
  expected = dict(data=2, tensor=2)
  expected[name] = 2 * expected.get(name, 1)
  assert _sizes(mesh) == expected
  # The outer axis is the slower half of its mesh axis: either half along it is
  # one slice, devices 0 to 3 or 4 to 7.
  halves = np.split(_ids(mesh), 2, axis=AXES.index(name))
  assert [sorted(h.flat) for h in halves] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_hybrid_goes_by_slice_index():
  devices = [_Device(i, slice_index=i % 2) for i in range(8)]
  grid = make_mesh('tensor=4', across_slices='data=2', devices=devices).devices
  slices = np.vectorize(lambda d: d.slice_index)(grid).reshape(2, 4)
  np.testing.assert_array_equal(slices, [[0] * 4, [1] * 4])


def test_hybrid_over_two_axes():
  mesh = make_mesh('tensor=2', across_slices='stage=2,data=2')
  ids = _ids(mesh).reshape(2, 2, 2)
  np.testing.assert_array_equal(ids, np.arange(8).reshape(2, 2, 2))


@pytest.mark.parametrize(
  'spec, outer, message',
  [
    ('tensor=4', 'data=-1', 'may not contain -1'),
    ('tensor=-1', 'data=3', 'needs 3 equal slices, but there are 8 devices'),
    ('tensor=2', 'data=2', 'uses 2 devices of each slice.* a slice has 4'),
    ('tensor=8', 'data=2', 'needs 8 devices, but there are 4'),
    ('tensor=4', 'pod=2', "unknown axis 'pod'"),
  ],
)
def test_hybrid_refused(spec, outer, message):
  with pytest.raises(ValueError, match=message):
    make_mesh(spec, across_slices=outer)


def test_hybrid_refuses_another_number_of_slices():
  devices = [_Device(i, slice_index=i // 2) for i in range(8)]
  with pytest.raises(ValueError, match='asks for 2 slices.* form 4'):
    make_mesh('tensor=4', across_slices='data=2', devices=devices)


def test_mesh_without_a_process_is_refused():
  devices = [_Device(i, process_index=i // 4) for i in range(8)]
  with pytest.raises(ValueError, match=r'none of processes \[1\]'):
    make_mesh('tensor=4', devices=devices)
  assert make_mesh('data=2,tensor=4', devices=devices).size == 8


def test_devices_can_be_chosen():
  mesh = make_mesh('tensor=-1', devices=jax.devices()[4:6])
  assert sorted(_ids(mesh).flat) == [4, 5]


def _python(code):
  return subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, timeout=120
  )


def test_simulate_devices_decides_what_jax_sees():
  done = _python(
    'import jax\n'
    'from jaxtrain.sharding import make_mesh, simulate_devices\n'
    'simulate_devices(6)\n'
    'print(len(jax.devices()), make_mesh("data=3,fsdp=-1").shape["fsdp"])\n'
  )
  assert done.stdout.split() == ['6', '2'], done.stderr


def test_simulate_devices_after_the_start_is_refused():
  before = jax.config.jax_platforms
  with pytest.raises(RuntimeError, match=r'simulate_devices\(4\) came after'):
    simulate_devices(4)
  assert jax.config.jax_platforms == before and len(jax.devices()) == 8


def test_simulate_devices_needs_one():
  with pytest.raises(ValueError, match='simulate_devices=0 must be at least 1'):
    simulate_devices(0)
