"""Meshes that shrink keep how the model is cut, and the batch."""

import itertools
import math

import pytest

from jaxtrain.sharding import elastic
from jaxtrain.sharding import mesh as mesh_lib


@pytest.mark.parametrize(
  'spec, num_devices, options, expected',
  [
    ('data=4,tensor=2', 8, {}, 'data=4,tensor=2'),
    ('data=4,tensor=2', 100, {}, 'data=4,tensor=2'),
    ('data=4,tensor=2', 7, dict(batch_size=12), 'data=3,tensor=2'),
    # 16 rows over 3 replicas are not equal.
    ('data=4,tensor=2', 7, {}, 'data=2,tensor=2'),
    ('data=4,tensor=2', 3, {}, 'data=1,tensor=2'),
    # fsdp divides parameters: 3 would not.
    ('fsdp=4', 3, dict(batch_size=12), 'fsdp=2'),
    ('fsdp=6', 5, dict(batch_size=12), 'fsdp=3'),
    # Equally large: memory is kept.
    ('data=2,fsdp=4', 4, {}, 'data=1,fsdp=4'),
    ('data=3,fsdp=4', 6, dict(batch_size=12), 'data=3,fsdp=2'),
    ('stage=2,data=2,expert=2', 7, {}, 'stage=2,data=1,expert=2'),
    # Whole processes: 3 replicas of one device do not fill two of them.
    (
      'data=8',
      7,
      dict(batch_size=24, devices_per_process=2),
      'data=6',
    ),
    ('data=4', 3, dict(batch_size=12, devices_per_process=2), 'data=2'),
    ('data=4', 3, dict(batch_size=12, devices_per_process=4), 'data=3'),
  ],
)
def test_what_is_left(spec, num_devices, options, expected):
  options = {'batch_size': 16, **options}
  assert elastic.shrink_mesh(spec, num_devices, **options) == expected


_SIZES = [(1, 2, 3, 4), (1, 2, 4, 6), (1, 2), (1, 2)]


@pytest.mark.parametrize('devices_per_process', [1, 2, 4])
@pytest.mark.parametrize('batch_size', [24, 96])
def test_no_mesh_breaks_a_rule(batch_size, devices_per_process):
  found = 0
  for data, fsdp, expert, tensor in itertools.product(*_SIZES):
    whole = dict(data=data, fsdp=fsdp, expert=expert, tensor=tensor)
    spec = ','.join(f'{a}={s}' for a, s in whole.items())
    for n in range(1, math.prod(whole.values()) + 1):
      try:
        new = mesh_lib.parse(
          elastic.shrink_mesh(
            spec,
            n,
            batch_size=batch_size,
            devices_per_process=devices_per_process,
          )
        )
      except ValueError:
        continue
      found += 1
      used = math.prod(new.values())
      assert used <= n
      assert (new['expert'], new['tensor']) == (expert, tensor)
      assert fsdp % new['fsdp'] == 0 and new['data'] <= data
      assert batch_size % (new['data'] * new['fsdp'] * expert) == 0
      assert used % devices_per_process == 0 or used < devices_per_process
  assert found > 300


@pytest.mark.parametrize(
  'spec, num_devices, options, message',
  [
    ('data=-1', 2, {}, 'no size to shrink from'),
    ('data=3', 2, {}, r'cannot cut batch_size=16'),
    ('data=4,tensor=4', 3, {}, 'tensor=4 must stay'),
    ('data=4', 0, {}, 'one device must stay'),
    ('data=3', 3, dict(batch_size=3, devices_per_process=2), 'idle'),
    ('pipe=3', 3, {}, 'unknown axis'),
  ],
)
def test_impossible_meshes(spec, num_devices, options, message):
  with pytest.raises(ValueError, match=message):
    elastic.shrink_mesh(spec, num_devices, **{'batch_size': 16, **options})


@pytest.mark.parametrize(
  'spec, rows, before, expected',
  [
    ('data=4', 16, 1, 1),
    ('data=2', 16, 1, 2),
    ('data=1', 16, 1, 4),
    ('data=2', 16, 2, 4),
    ('data=2,tensor=2', 16, 1, 2),
    ('data=3', 24, 1, 2),  # 8 rows a device, parts of 6 do not divide them.
    ('data=4,fsdp=2', 16, 2, 1),  # Larger than the whole: fewer parts.
  ],
)
def test_parts_are_no_larger_than_on_the_whole_mesh(
  spec, rows, before, expected
):
  got = elastic.accumulation(
    'data=4', spec, batch_size=rows, accumulation=before
  )
  assert got == expected


def test_processes_of_a_mesh():
  assert elastic.num_processes('data=4,tensor=2', 2) == 4
  assert elastic.num_processes('data=1', 2) == 1
