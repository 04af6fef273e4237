"""LAMB follows algorithm 2 of https://arxiv.org/abs/1904.00962."""

import jax.numpy as jnp
import numpy as np
import optax

from jaxtrain.optimizers.lamb import lamb


def _numpy_lamb(x, grads, lr, b1=0.9, b2=0.999, eps=1e-6, wd=0.01):
  """Algorithm 2, line by line, one layer, float64."""
  m = v = np.zeros_like(x)
  for t, g in enumerate(grads, start=1):
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g**2
    r = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    u = r + wd * x
    x = x - lr * np.linalg.norm(x) / np.linalg.norm(u) * u
  return x


def _run(tx, params, grads):
  state = tx.init(params)
  for g in grads:
    updates, state = tx.update(g, state, params)
    params = optax.apply_updates(params, updates)
  return params


def test_matches_the_paper():
  rng = np.random.default_rng(0)
  x, grads = rng.normal(size=(4, 3)), rng.normal(size=(10, 4, 3))
  params = _run(lamb(1e-2), jnp.float32(x), jnp.float32(grads))
  np.testing.assert_allclose(params, _numpy_lamb(x, grads, 1e-2), rtol=1e-5)


def test_each_layer_of_a_stack_has_its_own_ratio():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3, 4, 2)) * np.array([0.01, 1, 100]).reshape(3, 1, 1)
  grads = rng.normal(size=(10, 3, 4, 2))
  tree = lambda a: {'layers': {'mlp': {'up': {'kernel': jnp.float32(a)}}}}
  params = _run(lamb(1e-2), tree(x), [tree(g) for g in grads])
  for i in range(3):
    np.testing.assert_allclose(
      params['layers']['mlp']['up']['kernel'][i],
      _numpy_lamb(x[i], grads[:, i], 1e-2),
      rtol=1e-5,
    )


def test_zero_layer_takes_a_plain_adam_step():
  params = jnp.zeros((3,))
  updates, _ = lamb(1e-2, weight_decay=0.0).update(
    jnp.ones((3,)), lamb(1e-2).init(params), params
  )
  np.testing.assert_allclose(updates, -1e-2, rtol=1e-4)


def test_norms_of_bfloat16_are_taken_in_float32():
  n = 4096  # Summed in bfloat16, ones stop counting at 256.
  params, grads = jnp.ones(n, jnp.bfloat16), jnp.full(n, 2, jnp.bfloat16)
  # Of equal gradients, Adam's step is a sign: of the norm of the weights.
  tx = lamb(1.0, weight_decay=1.0, mask=None)
  updates, _ = tx.update(grads, tx.init(params), params)
  np.testing.assert_array_equal(np.float32(updates), -1.0)
