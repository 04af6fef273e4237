"""Cut-offs of awkward rows; shares of the unit interval are probabilities.

https://arxiv.org/abs/1805.04833, https://arxiv.org/abs/1904.09751 and
https://arxiv.org/abs/2407.01082 define the cuts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import dispatch
from pallas_kernels.sampling import pallas_tpu
from pallas_kernels.sampling import sampling

_BACKENDS = ('reference', 'xla', 'pallas_tpu')


def _draw(backend, logits, uniform, **changes):
  n = len(uniform)
  rows = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) | changes
  rows = [
    jnp.full(n, x, jnp.int32 if name == 'top_k' else jnp.float32)
    for name, x in rows.items()
  ]
  logits = jnp.broadcast_to(jnp.float32(logits), (n, len(logits)))
  f = jax.jit(dispatch.load('sampling', backend))
  return np.asarray(f(logits, *rows, jnp.float32(uniform)))


@pytest.mark.parametrize('backend', _BACKENDS)
@pytest.mark.parametrize(
  'changes, kept',
  [
    (dict(), [0, 1, 2, 3, 4, 5]),
    (dict(temperature=0.5), [0, 1, 2, 3, 4, 5]),
    (dict(top_k=3), [0, 1, 2]),
    (dict(top_p=0.8), [0, 1, 2]),
    (dict(min_p=0.3), [0, 1]),
    (dict(top_k=4, top_p=0.95, temperature=2.0), [0, 1, 2, 3]),
  ],
  ids=str,
)
def test_each_token_has_its_share_of_the_unit_interval(backend, changes, kept):
  logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -6.0])
  n = 160 if backend == 'pallas_tpu' else 4000
  probs = np.zeros(6)
  probs[kept] = np.exp(logits[kept] / changes.get('temperature', 1.0))
  probs /= probs.sum()
  tokens = _draw(backend, logits, (np.arange(n) + 0.5) / n, **changes)
  counts = np.bincount(tokens, minlength=6)
  assert np.all(np.abs(counts - n * probs) <= 1.01)


@pytest.mark.parametrize('backend', _BACKENDS)
def test_order_of_tokens(backend):
  """Token v comes at `(v % 512, v)`: all of one lane before the next."""
  n = 1100
  uniform = (np.arange(n) + 0.5) / n
  tokens = _draw(backend, np.zeros(n), uniform[::50])
  order = np.lexsort((np.arange(n), np.arange(n) % 512))
  np.testing.assert_array_equal(tokens, order[::50])


_RNG = np.random.default_rng(0)
_AWKWARD = {
  'equal': np.zeros(700),
  'two_values': np.where(np.arange(700) % 7 == 0, 1.0, 0.0),
  'forbidden': np.where(
    np.arange(700) % 9 == 4, _RNG.normal(size=700), -np.inf
  ),
  'very_small': np.where(np.arange(700) < 690, -1e30, np.arange(700.0)),
  'many_scales': np.sign(_RNG.normal(size=700))
  * 10.0 ** np.linspace(-30, 1, 700),
  'neighbours': np.float32(1) + np.arange(700) * 2.0**-23,
  'negative': -50 + _RNG.normal(size=700) ** 3,
}


@pytest.mark.parametrize('name', _AWKWARD)
def test_cuts_of_awkward_rows(name):
  """The set is exact: the first and the last of it, as sorting finds it."""
  logits = _RNG.permutation(_AWKWARD[name])
  uniform = np.array([0, 0.3, 0.7, 0.999999])
  for changes in (dict(top_k=7), dict(top_k=99, min_p=1e-3), dict(top_p=0.6)):
    expected = _draw('reference', logits, uniform, **changes)
    for backend in _BACKENDS[1:]:
      actual = _draw(backend, logits, uniform, **changes)
      np.testing.assert_array_equal(actual, expected, err_msg=str(changes))


def test_large_vocabulary_has_buckets_and_blocks():
  """Several logits a bucket, several blocks of rows, the last incomplete."""
  b, v = 11, 9001
  keys = jax.random.split(jax.random.key(0), 2)
  logits = jax.random.normal(keys[0], (b, v))
  rows = (
    jnp.linspace(0, 2, b),
    jnp.arange(b) * 40 % 600,
    jnp.where(jnp.arange(b) % 3 == 0, 1.0, 0.95),
    jnp.zeros(b),
    jax.random.uniform(keys[1], (b,)),
  )
  expected = sampling(logits, *rows, implementation='reference')
  actual = pallas_tpu.sampling(logits, *rows, config=dict(rows=8))
  np.testing.assert_array_equal(actual, expected)
  np.testing.assert_array_equal(sampling(logits, *rows), expected)
