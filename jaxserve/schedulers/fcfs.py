"""First come, first served: whole prompts, ahead of every decode.

The baseline others are compared with. Prompts of new requests are run as soon
as they fit, without decodes, and unsplit (Kwon et al., "Efficient Memory
Management for Large Language Model Serving with PagedAttention", SOSP 2023,
https://arxiv.org/abs/2309.06180, sections 4.5 and 5: preemption of the latest
arrival, first come first served). Decodes wait meanwhile: the stall that
Sarathi-Serve removes.

One deviation: a prompt longer than a step can compute is split over several
steps, which follow each other without decodes between them.
"""

from jaxserve.schedulers import base


def fcfs() -> base.Scheduler:
  """Runs whole prompts by arrival, and decodes when no prompt can run."""

  def schedule(requests, budget):
    ordered = sorted(requests, key=lambda r: r.arrival)
    decoding = [r for r in ordered if r.is_decoding]
    started = [r for r in ordered if r.is_running and not r.is_decoding]
    waiting = [r for r in ordered if not r.is_running]
    prompts = started + whole_prompts(started, waiting, budget)
    plan = base.admit(prompts, budget, budget.max_tokens, idle=decoding)
    if plan.run:
      return plan
    return base.admit(decoding, budget, budget.max_tokens, idle=started)

  return schedule


def whole_prompts(started, waiting, budget):
  """The first of `waiting` that fit unsplit beside those already started."""
  left = budget.max_tokens - sum(r.remaining for r in started)
  fitting = []
  for r in waiting[: budget.max_requests]:
    count = r.num_tokens - budget.start(r)
    # One that no step can hold gets a step of its own.
    if count > left and (fitting or left < budget.max_tokens):
      break
    fitting.append(r)
    left -= count
  return fitting
