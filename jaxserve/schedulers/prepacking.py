"""Prepacking: whole prompts packed into the tokens of a step.

Zhao et al., "Prepacking: A Simple Method for Fast Prefilling and Increased
Throughput in Large Language Models", AISTATS 2025,
https://arxiv.org/abs/2404.09529, algorithm 1 (bin packing of a batch's
prompts, first fit in decreasing length).

The paper packs prompts into rows so that a *padded* batch computes no padding,
with a mask and positions that restart at each prompt. Steps here are flat:
there is no padding between prompts to save, and mask and positions are always
those of one request. What remains of the method is which prompts share a step:
those that fill what decodes leave of it, unsplit. So a prompt's keys and values
are not read again by later chunks of it, and the compiled bucket is as full as
whole prompts make it. A step that splits prompts (`chunked_prefill`) is fuller
still; expect no gain in tokens per second over it.

Deviation: bins are packed one at a time, as steps come. The oldest prompt opens
each one, so that short prompts do not wait for ever behind long ones.
"""

from jaxserve.schedulers import base


def prepacking(window: int = 64) -> base.Scheduler:
  """Packs prompts behind the decodes of each step.

  Args:
    window: Of the waiting requests, the oldest so many are packed (the batch
      of the paper).

  Raises:
    ValueError: `window` is below 1.
  """
  if window < 1:
    raise ValueError(f'window={window} must be at least 1')

  def schedule(requests, budget):
    ordered = sorted(requests, key=lambda r: r.arrival)
    running = sorted(
      (r for r in ordered if r.is_running), key=lambda r: not r.is_decoding
    )
    waiting = [r for r in ordered if not r.is_running][:window]
    left = budget.max_tokens - sum(r.remaining for r in running)
    rows = budget.max_requests - len(running)
    size = {r.id: r.num_tokens - budget.start(r) for r in waiting}
    chosen = first_fit(waiting, size, left)[: max(rows, 0)] if rows > 0 else []
    return base.admit(running + chosen, budget, budget.max_tokens)

  return schedule


def first_fit(waiting, size, capacity):
  """One bin: the first request, then the others by decreasing size.

  The first is taken even if it does not fit: it is the only one to be split.
  """
  if not waiting or capacity < 1:
    return []
  first, *others = waiting
  bin_, left = [first], capacity - size[first.id]
  for r in sorted(others, key=lambda r: -size[r.id]):
    if size[r.id] <= left:
      bin_.append(r)
      left -= size[r.id]
  return bin_
