"""Equation 1 of https://arxiv.org/abs/2404.06395."""

import numpy as np
import pytest

from jaxtrain.schedules.warmup_stable_decay import warmup_stable_decay


def _paper(s, eta, warmup, stable_end, end):
  """The three cases, with f one minus a square root."""
  if s < warmup:
    return (s + 1) / warmup * eta  # Steps are counted from 0 here.
  if s < stable_end:
    return eta
  return (1 - np.sqrt((s - stable_end) / (end - stable_end))) * eta


def test_matches_the_paper():
  schedule = warmup_stable_decay(
    3.0, num_steps=100, warmup_steps=10, decay_steps=30
  )
  values = [schedule(s) for s in range(101)]
  expected = [_paper(s, 3.0, 10, 70, 100) for s in range(101)]
  np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)


def test_decays_over_a_tenth_by_default():
  values = [warmup_stable_decay(1.0, num_steps=100)(s) for s in range(101)]
  assert values[90] == 1.0 and values[91] < 0.8


def test_the_plateau_does_not_depend_on_the_end():
  short = warmup_stable_decay(1.0, num_steps=100, warmup_steps=5)
  long = warmup_stable_decay(1.0, num_steps=1000, warmup_steps=5)
  assert all(short(s) == long(s) for s in range(90))


def test_no_decay_falls_at_the_end():
  schedule = warmup_stable_decay(1.0, num_steps=10, decay_steps=0)
  assert [float(schedule(s)) for s in (0, 9, 10, 11)] == [1, 1, 0, 0]


def test_parts_that_do_not_fit_are_named():
  with pytest.raises(ValueError, match='warmup_steps=6 . decay_steps=5 is mor'):
    warmup_stable_decay(1.0, num_steps=10, warmup_steps=6, decay_steps=5)
