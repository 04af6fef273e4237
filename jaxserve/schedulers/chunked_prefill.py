"""Stall-free batching: decodes first, then prompts in chunks.

Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with
Sarathi-Serve", OSDI 2024, https://arxiv.org/abs/2403.02310, algorithm 3.
"""

import dataclasses

from jaxserve.schedulers import base


def chunked_prefill(
  chunk: int = 512, token_budget: int | None = None
) -> base.Scheduler:
  """Runs every decode, then fills the token budget with prompt chunks.

  Args:
    chunk: Tokens of one prompt that a step computes at most.
    token_budget: Tokens a step may compute while requests decode: it bounds
      the time between their tokens (section 4.2). Every decode runs even if
      there are more of them. `None` is what the engine can compute.

  Returns:
    The scheduler. Ties are broken by arrival.

  Raises:
    ValueError: `chunk` or `token_budget` is below 1.
  """
  if chunk < 1:
    raise ValueError(f'chunk={chunk} must be at least 1')
  if token_budget is not None and token_budget < 1:
    raise ValueError(f'token_budget={token_budget} must be at least 1')

  def schedule(requests, budget):
    num_decoding = sum(r.is_decoding for r in requests)
    if token_budget is not None and num_decoding:
      limit = min(max(token_budget, num_decoding), budget.max_tokens)
      budget = dataclasses.replace(budget, max_tokens=limit)
    return base.admit(sorted(requests, key=_order), budget, chunk)

  return schedule


def _order(r):
  return not r.is_decoding, not r.is_running, r.arrival
