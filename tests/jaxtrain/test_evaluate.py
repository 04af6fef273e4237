"""The mean is over tokens, not over batches."""

import jax
import numpy as np
import pytest

from jaxtrain.evaluate import evaluate
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import make_mesh
from jaxtrain.sharding import named_sharding

_SHARDING = named_sharding(
  make_mesh('data=2'), PRESETS['default'], 'batch', 'seq'
)


def _batches(weights):
  for i, weight in enumerate(weights):
    yield {
      'weights': np.full((4, 3), weight, np.float32),
      'id': np.full((4, 3), i),
    }


@jax.jit
def _step(params, batch):
  weight = batch['weights'].sum()
  return dict(
    nll=params * (1 + batch['id'][0, 0]) * weight,
    correct=0.5 * weight,
    weight=weight,
  )


def test_weighted_mean_of_the_first_batches():
  result = evaluate(_step, 2.0, _batches([1, 3, 100]), _SHARDING, 2)
  assert result['eval_loss'] == pytest.approx((2 * 1 + 4 * 3) / 4)
  assert result['eval_accuracy'] == 0.5
  fewer = evaluate(_step, 2.0, _batches([1]), _SHARDING, 2)
  assert fewer['eval_loss'] == 2.0


@pytest.mark.parametrize('weights', [[], [0.0, 0.0]])
def test_nothing_to_evaluate_on(weights):
  with pytest.raises(ValueError, match='no token'):
    evaluate(_step, 1.0, _batches(weights), _SHARDING, 2)
