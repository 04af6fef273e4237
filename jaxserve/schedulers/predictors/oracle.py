"""The length that was asked for: exact where nothing stops a request early.

The perfect predictor that papers compare theirs with (Jin et al., "S3:
Increasing GPU Utilization during Generative Inference for Higher Throughput",
NeurIPS 2023, https://arxiv.org/abs/2306.06000, section 5).
"""

from jaxserve.schedulers.predictors import base


def oracle() -> base.Predictor:
  """Predicts `max_tokens`."""
  return Oracle()


class Oracle:
  """The predictor."""

  def __call__(self, prompt, max_tokens):
    return float(max_tokens)

  def observe(self, prompt, num_generated):
    """Nothing to learn."""
