"""Dynamic SplitFuse: forward passes of one steady size.

Holmes et al., "DeepSpeed-FastGen: High-throughput Text Generation for LLMs via
MII and DeepSpeed-Inference", https://arxiv.org/abs/2401.08671, section 3.

The mechanism is that of `chunked_prefill`; what differs is the budget. Sarathi
bounds the steps that delay a decode. SplitFuse gives *every* step the same
number of tokens, prompts alone included, as the throughput of a forward pass
saturates there and it may always be compiled for the same shape; and as long
as there is work the last prompt is cut, however short, to fill it exactly.
"""

import dataclasses

from jaxserve.schedulers import base


def split_fuse(token_budget: int = 512) -> base.Scheduler:
  """Composes steps of `token_budget` tokens: decodes, then prompts.

  Args:
    token_budget: Tokens of a step, if there are as many. The engine's own
      limit holds where it is smaller.

  Returns:
    The scheduler. Ties are broken by arrival.

  Raises:
    ValueError: `token_budget` is below 1.
  """
  if token_budget < 1:
    raise ValueError(f'token_budget={token_budget} must be at least 1')

  def schedule(requests, budget):
    size = min(token_budget, budget.max_tokens)
    return base.admit(
      sorted(requests, key=_order),
      dataclasses.replace(budget, max_tokens=size),
      chunk=size,
    )

  return schedule


def _order(r):
  # Tokens being generated, prompts under way, new prompts.
  return not r.is_decoding, not r.is_running, r.arrival
