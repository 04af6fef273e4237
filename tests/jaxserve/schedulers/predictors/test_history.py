"""Lengths of the past; S3, https://arxiv.org/abs/2306.06000."""

import numpy as np
import pytest

from jaxserve.schedulers.predictors.history import history


@pytest.mark.parametrize('q', [0.1, 0.5, 0.9, 1.0])
def test_history_is_the_quantile_of_the_last_lengths_of_the_bucket(q):
  rng = np.random.default_rng(0)
  predictor = history(quantile=q, memory=20, min_count=3)
  short = rng.integers(1, 100, 50).tolist()
  long = rng.integers(500, 900, 30).tolist()
  for n in short:
    predictor.observe((0,) * 9, n)
  for n in long:
    predictor.observe((0,) * 100, n)
  of = lambda values: np.quantile(values[-20:], q, method='inverted_cdf')
  assert predictor((1,) * 15, 1000) == of(short)  # 8 to 15 are one bucket.
  assert predictor((1,) * 64, 1000) == of(long)
  # A bucket nobody was in: the last 20 of all, which were long.
  assert predictor((1,), 1000) == of(long)


def test_a_bucket_is_asked_once_it_has_enough():
  predictor = history(min_count=2)
  predictor.observe((0,), 10)
  predictor.observe((0,) * 50, 90)
  assert predictor((0,) * 50, 1000) == 10  # The lower median of all.
  predictor.observe((0,) * 50, 90)
  assert predictor((0,) * 50, 1000) == 90


@pytest.mark.parametrize(
  'kwargs, message',
  [
    (dict(quantile=0), 'quantile=0'),
    (dict(quantile=1.5), 'quantile=1.5'),
    (dict(memory=0), 'memory=0'),
    (dict(min_count=0), 'min_count=0'),
  ],
)
def test_wrong_arguments_are_named(kwargs, message):
  with pytest.raises(ValueError, match=message):
    history(**kwargs)
