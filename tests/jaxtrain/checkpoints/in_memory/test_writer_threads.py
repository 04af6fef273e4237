"""Several keepers of one process are fed at once from the same arrays."""

import gc
import sys

import jax
import numpy as np
import pytest

from jaxtrain.checkpoints.in_memory.keeper import Keeper
from jaxtrain.checkpoints.in_memory.snapshots import InMemorySnapshots
from jaxtrain.sharding import make_mesh


@pytest.fixture
def restless():
  """Threads that change all the time, and in the middle of everything."""
  interval, threshold = sys.getswitchinterval(), gc.get_threshold()
  sys.setswitchinterval(1e-6)
  gc.set_threshold(20)
  yield
  sys.setswitchinterval(interval)
  gc.set_threshold(*threshold)


def test_all_see_all_shards(restless):
  sharding = jax.sharding.NamedSharding(
    make_mesh('data=2,fsdp=2,tensor=2'), jax.P(('data', 'fsdp', 'tensor'))
  )
  state = {
    str(i): jax.device_put(np.arange(8.0) + i, sharding) for i in range(60)
  }
  keepers = [Keeper() for _ in range(2)]
  try:
    with InMemorySnapshots([k.address for k in keepers]) as snapshots:
      for step in range(1, 9):
        snapshots.save(step, state)
      snapshots.wait()
      assert (snapshots.saved, snapshots.failed) == (8, 0)
      restored, _, _ = snapshots.restore(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
  finally:
    for keeper in keepers:
      keeper.close()
