"""Mean loss over held-out batches."""

from collections.abc import Callable, Iterable
import itertools
from typing import Any

import jax
from jax.sharding import NamedSharding
import numpy as np

from jaxtrain.distributed import global_batch


def evaluate(
  eval_step: Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]],
  params: Any,
  dataset: Iterable[dict[str, np.ndarray]],
  sharding: NamedSharding,
  num_batches: int,
) -> dict[str, float]:
  """Evaluates parameters on the first batches of a dataset.

  Args:
    eval_step: From `make_eval_step`.
    params: Model parameters.
    dataset: Batches of this process.
    sharding: Of a global batch.
    num_batches: At most how many batches.

  Returns:
    'eval_loss' in nats per token (weighted mean, without z-loss) and
    'eval_accuracy'.

  Raises:
    ValueError: The dataset gives no token to evaluate on.
  """
  batches = itertools.islice(iter(dataset), num_batches)
  sums = [eval_step(params, global_batch(b, sharding)) for b in batches]
  total = {
    name: sum(float(s[name]) for s in sums)
    for name in ('nll', 'correct', 'weight')
  }
  if not total['weight']:
    raise ValueError(
      f'{len(sums)} evaluation batches hold no token with a weight'
    )
  return {
    'eval_loss': total['nll'] / total['weight'],
    'eval_accuracy': total['correct'] / total['weight'],
  }
