"""Writes land in their slots and nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.cache import pages as pages_lib


def test_write_is_a_scatter_by_slot():
  pages = pages_lib.allocate(3, 4, 5, 2, 6, jnp.float32)
  rng = np.random.default_rng(0)
  k, v = rng.normal(size=(2, 7, 2, 6)).astype(np.float32)
  slot = np.array([19, 0, -1, 7, 3, -1, 12])
  new = jax.jit(pages_lib.write)(pages, 1, slot, k, v)
  for got, values in ((new.k, k), (new.v, v)):
    expected = np.zeros((3, 20, 2, 6), np.float32)
    for t, s in enumerate(slot):
      if s >= 0:
        expected[1, s] = values[t]
    slots = np.asarray(got).swapaxes(2, 3).reshape(3, 20, 2, 6)
    np.testing.assert_array_equal(slots, expected)
