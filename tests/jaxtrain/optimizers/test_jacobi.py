"""Jacobi's rotations find the singular vectors that NumPy finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.optimizers._jacobi import left_singular_vectors

_find = jax.jit(left_singular_vectors)


@pytest.mark.parametrize('shape', [(1, 3), (5, 9), (6, 6), (32, 40)])
def test_vectors_are_numpys(shape):
  g = np.random.default_rng(0).normal(size=shape)
  found = np.float64(_find(jnp.float32(g)))
  u, _, _ = np.linalg.svd(g, full_matrices=False)
  sign = np.sign(np.sum(found * u, 0))
  # Angles of float32 between values that lie close.
  np.testing.assert_allclose(found * sign, u, atol=2e-4)


def test_subspace_and_orthonormality():
  g = np.random.default_rng(1).normal(size=(2, 24, 50))
  found = np.float64(_find(jnp.float32(g)))
  eye = np.broadcast_to(np.eye(24), (2, 24, 24))
  np.testing.assert_allclose(found.swapaxes(1, 2) @ found, eye, atol=1e-5)
  for i in range(2):
    u = np.linalg.svd(g[i])[0][:, :6]
    # Cosines of the angles between the subspaces.
    cosines = np.linalg.svd(u.T @ found[i][:, :6])[1]
    np.testing.assert_allclose(cosines, 1, atol=1e-5)


@pytest.mark.parametrize('rank', [0, 1, 3])
def test_less_than_full_rank(rank):
  rng = np.random.default_rng(2)
  g = rng.normal(size=(7, rank)) @ rng.normal(size=(rank, 12))
  found = np.float64(_find(jnp.float32(g)))
  np.testing.assert_allclose(found.T @ found, np.eye(7), atol=1e-5)
  rest = g - found[:, :rank] @ (found[:, :rank].T @ g)
  np.testing.assert_allclose(rest, 0, atol=1e-4)


def test_what_is_no_number_ends():
  assert _find(jnp.full((4, 6), jnp.nan)).shape == (4, 4)
