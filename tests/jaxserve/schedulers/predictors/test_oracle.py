"""The longest a request may get; and what every predictor must do."""

import pytest

from jaxserve.schedulers import predictors
from jaxserve.schedulers.predictors.base import Predictor
from jaxserve.schedulers.predictors.oracle import oracle


@pytest.mark.parametrize('name', predictors.names())
def test_every_predictor_follows_the_interface(name):
  predictor = predictors.get(name)()
  assert isinstance(predictor, Predictor)
  assert predictor((1, 2), 64) == 64, 'nothing is known yet'
  predictor.observe((1, 2), 10)
  assert 0 < predictor((1, 2), 64) <= 64
  assert predictor((1, 2), 3) <= 3


def test_the_oracle_is_what_was_asked_for():
  predictor = oracle()
  predictor.observe((1,), 5)
  assert predictor((1,), 77) == 77
