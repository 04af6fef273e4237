"""Equation 5 of https://arxiv.org/abs/1608.03983, after a warm-up."""

import numpy as np

from jaxtrain.schedules.warmup_cosine import warmup_cosine


def test_matches_the_paper():
  schedule = warmup_cosine(2.0, num_steps=50, warmup_steps=10, final_value=0.5)
  t_cur, t_i = np.arange(41), 40
  expected = 0.5 + 0.5 * (2.0 - 0.5) * (1 + np.cos(t_cur / t_i * np.pi))
  values = [schedule(10 + t) for t in t_cur]
  np.testing.assert_allclose(values, expected, rtol=1e-5)
