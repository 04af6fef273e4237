"""Who the processes are, and whose rows are whose."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from jaxtrain import distributed
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import make_mesh
from jaxtrain.sharding import named_sharding


@pytest.mark.parametrize(
  'env, expected',
  [
    ({}, False),
    (dict(SLURM_JOB_ID='1', SLURM_PROCID='0', SLURM_NTASKS='4'), True),
    (dict(SLURM_JOB_ID='1', SLURM_PROCID='0', SLURM_NTASKS='1'), False),
    # A shell of `salloc` is in a job but is not one of its tasks.
    (dict(SLURM_JOB_ID='1', SLURM_NTASKS='4'), False),
    (dict(OMPI_COMM_WORLD_SIZE='2'), True),
    (dict(TPU_WORKER_HOSTNAMES='a,b'), True),
    (dict(TPU_WORKER_HOSTNAMES='localhost'), False),
    (dict(MEGASCALE_NUM_SLICES='2', TPU_WORKER_HOSTNAMES='a'), True),
  ],
)
def test_detection(env, expected):
  assert distributed.is_cluster({'JAX_PLATFORMS': 'cpu', **env}) == expected


@pytest.mark.parametrize(
  'arguments, message',
  [
    (('host:1', 2, None), 'process_id is missing'),
    ((None, 2, 0), 'coordinator is missing'),
    (('host:1', 2, 2), 'process_id=2'),
    (('host:1', 0, 0), 'num_processes=0'),
  ],
)
def test_wrong_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    distributed.initialize(*arguments)


def test_one_process_joins_nothing():
  assert not distributed.initialize(None, 1, None)
  assert not distributed.initialize('host:1', 1, 0)


@pytest.mark.parametrize('count', [1, 2])
def test_several_processes_of_cpus_share_no_cache(count, monkeypatch):
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *a, **k: None)
  monkeypatch.setattr(jax, 'process_count', lambda: count)
  before = jax.config.jax_enable_compilation_cache
  assert before
  try:
    assert distributed.initialize('host:1', 2, 0) == (count == 2)
    assert jax.config.jax_enable_compilation_cache == (count == 1)
  finally:
    jax.config.update('jax_enable_compilation_cache', before)


@dataclasses.dataclass(frozen=True)
class _Device:
  id: int
  process_index: int


def _share(monkeypatch, row_of_device, owners, here):
  """`batch_share` where device i, of process `owners[i]`, has one row in 4."""
  size = len(owners)
  rows = {
    _Device(i, owner): (slice(r * size // 4, (r + 1) * size // 4),)
    for i, (r, owner) in enumerate(zip(row_of_device, owners, strict=True))
  }
  sharding = types.SimpleNamespace(
    mesh=types.SimpleNamespace(size=size, shape={'data': 4}),
    spec=jax.P('data'),
    devices_indices_map=lambda shape: rows,
  )
  monkeypatch.setattr(jax, 'process_index', lambda: here)
  return distributed.batch_share(sharding)


@pytest.mark.parametrize(
  'row_of_device, owners, shares',
  [
    # Each process has rows of its own.
    ([0, 1, 2, 3], [0, 0, 1, 1], {0: (0, 2), 1: (1, 2)}),
    ([2, 3, 0, 1], [0, 0, 1, 1], {0: (1, 2), 1: (0, 2)}),
    # Another axis crosses processes: both hold all rows.
    ([0, 1, 2, 3] * 2, [0] * 4 + [1] * 4, {0: (0, 1), 1: (0, 1)}),
    # Two pairs of processes.
    (
      [0, 1, 0, 1, 2, 3, 2, 3],
      [0, 0, 1, 1, 2, 2, 3, 3],
      {1: (0, 2), 2: (1, 2)},
    ),
  ],
)
def test_shares_of_rows(monkeypatch, row_of_device, owners, shares):
  for here, expected in shares.items():
    assert _share(monkeypatch, row_of_device, owners, here) == expected


def test_impossible_shares(monkeypatch):
  with pytest.raises(ValueError, match='neither the same nor separate'):
    _share(monkeypatch, [0, 2, 1, 3], [0, 0, 1, 1], 0)
  with pytest.raises(ValueError, match='process 7 has no device'):
    _share(monkeypatch, [0, 1, 2, 3], [0, 0, 1, 1], 7)


def test_single_process_has_all_rows():
  mesh = make_mesh('data=2,fsdp=2,tensor=2')
  sharding = named_sharding(mesh, PRESETS['default'], 'batch', 'seq')
  assert distributed.batch_share(sharding) == (0, 1)


def test_global_batch():
  mesh = make_mesh('data=2,context=2')
  sharding = named_sharding(mesh, PRESETS['default'], 'batch', 'seq')
  local = np.arange(4 * 6).reshape(4, 6)
  batch = distributed.global_batch({'tokens': local}, sharding)
  np.testing.assert_array_equal(batch['tokens'], local)
  assert batch['tokens'].addressable_shards[0].data.shape == (2, 3)
  with pytest.raises(ValueError, match='3 rows of 6 tokens'):
    distributed.global_batch({'tokens': local[:3]}, sharding)
