"""Thresholds against sorting; frequencies against probabilities.

https://arxiv.org/abs/1904.09751 (top-p), https://arxiv.org/abs/2407.01082
(min-p), https://arxiv.org/abs/1805.04833 (top-k).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.samplers.truncated import truncated
from pallas_kernels.sampling import keep
from pallas_kernels.sampling import sampling

_sample = jax.jit(truncated())
_distribution = jax.jit(truncated().distribution)
_sampling = jax.jit(sampling)


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
def test_frequencies_are_the_probabilities(make_rows, changes):
  n = 40_000
  logits = np.float32([2.0, 1.0, 0.5, 0.0, -1.0, -6.0])
  tokens = _sample(jnp.tile(logits, (n, 1)), make_rows(n, **changes))
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


def test_greedy_rows_in_a_mixed_batch(make_rows):
  logits = jax.random.normal(jax.random.key(0), (64, 50))
  temperature = jnp.where(jnp.arange(64) % 2 == 0, 0.0, 5.0)
  tokens = _sample(logits, make_rows(64, temperature=temperature))
  best = jnp.argmax(logits, axis=-1)
  np.testing.assert_array_equal(tokens[::2], best[::2])
  assert np.mean(tokens[1::2] == best[1::2]) < 0.5


def test_a_row_depends_on_its_seed_and_position_alone(make_rows):
  logits = jnp.zeros((1, 1000))
  draw = lambda n, seed, position: np.asarray(
    _sample(
      jnp.tile(logits, (n, 1)),
      make_rows(n, seed=jnp.arange(n) + seed, position=position),
    )
  )
  np.testing.assert_array_equal(draw(8, 3, 5)[:2], draw(2, 3, 5))
  np.testing.assert_array_equal(draw(8, 3, 5)[1:], draw(7, 4, 5))
  assert not np.array_equal(draw(8, 3, 5), draw(8, 3, 6))
  assert len(set(draw(200, 0, 1))) > 150


def _numpy_distribution(logits, temperature, top_k, top_p, min_p):
  """The definition, float64."""
  if temperature == 0:
    return (np.arange(len(logits)) == logits.argmax()).astype(float)
  scaled = logits.astype(np.float64) / temperature
  kept = _numpy_keep(scaled, top_k, top_p, min_p)
  weights = np.where(kept, np.exp(scaled - scaled.max()), 0)
  return weights / weights.sum()


def _settings(rng, n):
  return dict(
    temperature=rng.choice([0.0, 0.5, 1.0, 1.7], n),
    top_k=rng.choice([0, 1, 3, 8, 100], n),
    top_p=rng.choice([1.0, 0.9, 0.4], n),
    min_p=rng.choice([0.0, 0.05, 0.5], n),
  )


def test_distribution_is_as_defined(make_rows):
  rng = np.random.default_rng(0)
  n, vocab = 300, 37
  logits = np.float32(rng.normal(scale=3, size=(n, vocab)))
  # Masked tokens, but never all of them.
  masked = rng.random((n, vocab)) < rng.choice([0, 0.5, 1], (n, 1))
  masked[np.arange(n), rng.integers(0, vocab, n)] = False
  logits[masked] = -np.inf
  rows = _settings(rng, n)
  actual = _distribution(logits, make_rows(n, **rows))
  assert actual.dtype == jnp.float32
  for u in range(n):
    row = {k: v[u] for k, v in rows.items()}
    np.testing.assert_allclose(
      np.exp(actual[u]), _numpy_distribution(logits[u], **row), atol=2e-6
    )
  assert not np.any(np.asarray(actual)[masked] > -np.inf)


@pytest.mark.parametrize('ties', [False, True])
@pytest.mark.parametrize('seed', range(6))
def test_tokens_come_from_the_distribution(make_rows, seed, ties):
  """Same support exactly; frequencies by Pearson's chi-square statistic."""
  rng = np.random.default_rng(seed)
  n, vocab = 20_000, 12
  logits = rng.normal(scale=1.5, size=vocab)
  logits = np.float32(np.round(logits) if ties else logits)
  logits[rng.integers(0, vocab, 3)] = -np.inf
  rows = {k: v[0] for k, v in _settings(rng, 1).items()}
  if seed:
    rows['temperature'] = max(rows['temperature'], 0.5)
  one = make_rows(1, **rows)
  probs = np.exp(truncated().distribution(jnp.asarray(logits)[None], one))[0]
  tokens = _sample(jnp.tile(logits, (n, 1)), make_rows(n, **rows, seed=seed))
  counts = np.bincount(tokens, minlength=vocab)
  assert not counts[probs == 0].any()
  likely = n * probs > 25
  assert counts[likely].all()
  expected = n * probs[likely]
  statistic = np.sum((counts[likely] - expected) ** 2 / expected)
  # Mean k, variance 2k: five standard deviations, and room for few k.
  k = likely.sum()
  assert statistic <= k + 5 * np.sqrt(2 * k) + 10


def test_what_can_be_drawn_at_all_is_what_has_a_probability(make_rows):
  rng = np.random.default_rng(1)
  n, vocab = 64, 19
  logits = np.float32(np.round(rng.normal(scale=2, size=(n, vocab))))
  rows = make_rows(n, **_settings(rng, n))
  log_probs = np.asarray(truncated().distribution(jnp.asarray(logits), rows))
  drawn = np.zeros((n, vocab), bool)
  count = 500
  for uniform in np.linspace(0, 1, count, endpoint=False, dtype=np.float32):
    tokens = _sampling(
      logits,
      rows.temperature,
      rows.top_k,
      rows.top_p,
      rows.min_p,
      np.full(n, uniform),
    )
    drawn[np.arange(n), tokens] = True
  assert not drawn[np.isneginf(log_probs)].any()
  assert drawn[np.exp(log_probs) > 1.01 / count].all()
