"""The cost of a step."""

import numpy as np
import pytest

from jaxserve.simulate.cost import CostModel


def _steps(cost, noise=0.0):
  rng = np.random.default_rng(0)
  tokens, kv = rng.integers(1, 500, 80), rng.integers(1, 10**5, 80)
  return [
    (n, k, cost.step_s(n, k) * (1 + noise * rng.standard_normal()))
    for n, k in zip(tokens.tolist(), kv.tolist(), strict=True)
  ]


def test_is_linear():
  assert CostModel(1.0, 0.5, 0.25).step_s(4, 8) == 1.0 + 2.0 + 2.0


@pytest.mark.parametrize(
  'cost',
  [CostModel(1e-2, 1e-4, 1e-7), CostModel(0.0, 1e-4, 0.0), CostModel(1, 0, 0)],
)
def test_fit_finds_the_costs_that_made_the_steps(cost):
  found = CostModel.fit(_steps(cost))
  for name in ('fixed_s', 'token_s', 'kv_token_s'):
    assert getattr(found, name) == pytest.approx(getattr(cost, name), abs=1e-9)
  found = CostModel.fit(_steps(cost, noise=0.02))
  assert found.step_s(250, 50_000) == pytest.approx(
    cost.step_s(250, 50_000), rel=0.02
  )


def test_no_cost_is_negative():
  # Larger steps that took less time: the best line falls.
  found = CostModel.fit([(1, 9, 3.0), (2, 5, 2.0), (3, 1, 1.0), (4, 0, 0.5)])
  assert min(found.fixed_s, found.token_s, found.kv_token_s) >= 0
  with pytest.raises(ValueError, match='2 steps'):
    CostModel.fit([(1, 1, 1.0)] * 2)
