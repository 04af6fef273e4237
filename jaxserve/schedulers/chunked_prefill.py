"""Stall-free batching: decodes first, then prompts in chunks.

Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with
Sarathi-Serve", OSDI 2024, https://arxiv.org/abs/2403.02310, algorithm 3.
"""

from jaxserve.schedulers import base


def chunked_prefill(chunk: int = 512) -> base.Scheduler:
  """Runs every decode, then fills the token budget with prompt chunks.

  Args:
    chunk: Tokens of one prompt that a step computes at most.

  Returns:
    The scheduler. Ties are broken by arrival.

  Raises:
    ValueError: `chunk` is below 1.
  """
  if chunk < 1:
    raise ValueError(f'chunk={chunk} must be at least 1')

  def schedule(requests, budget):
    order = lambda r: (not r.is_decoding, not r.is_running, r.arrival)
    return base.admit(sorted(requests, key=order), budget, chunk)

  return schedule
