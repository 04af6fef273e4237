"""Thresholds against sorting; frequencies against probabilities.

https://arxiv.org/abs/1904.09751 (top-p), https://arxiv.org/abs/2407.01082
(min-p), https://arxiv.org/abs/1805.04833 (top-k).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.samplers import base
from jaxserve.samplers.truncated import truncated
from pallas_kernels.sampling import keep


def _numpy_keep(logits, top_k, top_p, min_p):
  """The definitions, by sorting one row, float64."""
  logits = logits.astype(np.float64)
  order = np.argsort(-logits, kind='stable')
  kept = order[: top_k or len(order)]
  probs = np.exp(logits[kept] - logits.max())
  probs /= probs.sum()
  kept = kept[: np.searchsorted(np.cumsum(probs), top_p - 1e-9) + 1]
  full = np.exp(logits - logits.max())
  kept = kept[full[kept] >= min_p]
  mask = np.zeros(len(logits), bool)
  mask[kept] = True
  return mask


@pytest.mark.parametrize('vocab', [1, 7, 301])
def test_keeps_what_sorting_keeps(vocab):
  rng = np.random.default_rng(vocab)
  rows = 200
  logits = np.float32(rng.normal(scale=3, size=(rows, vocab)))
  top_k = rng.choice([0, 1, 2, 5, vocab, 2 * vocab], rows)
  top_p = np.float32(rng.choice([1.0, 0.9, 0.5, 0.01], rows))
  min_p = np.float32(rng.choice([0.0, 0.05, 0.5, 1.0], rows))
  kept = np.asarray(jax.jit(keep)(logits, top_k, top_p, min_p))
  for row in range(rows):
    expected = _numpy_keep(logits[row], top_k[row], top_p[row], min_p[row])
    np.testing.assert_array_equal(kept[row], expected, err_msg=str(row))
  assert kept.any(axis=1).all()


def _rows(n, **changes):
  fields = dict(
    temperature=jnp.ones(n),
    top_k=jnp.zeros(n, jnp.int32),
    top_p=jnp.ones(n),
    min_p=jnp.zeros(n),
    seed=jnp.zeros(n, jnp.int32),
    position=jnp.arange(n, dtype=jnp.int32),
  )
  return base.Rows(**(fields | changes))


@pytest.mark.parametrize(
  'changes',
  [
    dict(),
    dict(temperature=0.5),
    dict(top_k=3),
    dict(top_p=0.8),
    dict(min_p=0.3),
  ],
  ids=lambda c: next(iter(c), 'plain'),
)
def test_frequencies_are_the_probabilities(changes):
  n = 40_000
  logits = np.float32([2.0, 1.0, 0.5, 0.0, -1.0, -6.0])
  fields = {k: jnp.full(n, v) for k, v in changes.items()}
  sample = jax.jit(truncated())
  tokens = sample(jnp.tile(logits, (n, 1)), _rows(n, **fields))
  scaled = logits / changes.get('temperature', 1.0)
  mask = _numpy_keep(
    scaled,
    changes.get('top_k', 0),
    changes.get('top_p', 1.0),
    changes.get('min_p', 0.0),
  )
  probs = np.where(mask, np.exp(scaled), 0)
  probs /= probs.sum()
  counts = np.bincount(tokens, minlength=6)
  assert not counts[~mask].any()
  # Five standard deviations of a binomial count.
  bound = 5 * np.sqrt(n * probs * (1 - probs)) + 1
  assert np.all(np.abs(counts - n * probs) <= bound)


def test_greedy_rows_in_a_mixed_batch():
  logits = jax.random.normal(jax.random.key(0), (64, 50))
  temperature = jnp.where(jnp.arange(64) % 2 == 0, 0.0, 5.0)
  tokens = jax.jit(truncated())(logits, _rows(64, temperature=temperature))
  best = jnp.argmax(logits, axis=-1)
  np.testing.assert_array_equal(tokens[::2], best[::2])
  assert np.mean(tokens[1::2] == best[1::2]) < 0.5


def test_a_row_depends_on_its_seed_and_position_alone():
  logits = jnp.zeros((1, 1000))
  sample = jax.jit(truncated())
  draw = lambda n, seed, position: np.asarray(
    sample(
      jnp.tile(logits, (n, 1)),
      _rows(
        n,
        seed=jnp.arange(n, dtype=jnp.int32) + seed,
        position=jnp.full(n, position, jnp.int32),
      ),
    )
  )
  np.testing.assert_array_equal(draw(8, 3, 5)[:2], draw(2, 3, 5))
  np.testing.assert_array_equal(draw(8, 3, 5)[1:], draw(7, 4, 5))
  assert not np.array_equal(draw(8, 3, 5), draw(8, 3, 6))
  assert len(set(draw(200, 0, 1))) > 150
