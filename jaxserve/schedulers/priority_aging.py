"""Priorities that grow with age, and preempt.

Kleinrock and Finkelstein, "Time Dependent Priority Queues", Operations Research
15(1), 1967, https://doi.org/10.1287/opre.15.1.104, linear growth (r = 1), and
preemptive.

Deviation: classes differ in where they start, not in how fast they grow:
`priority + rate * (now - arrival)`. So the order of two requests never changes
while they live, and they cannot preempt each other in turns; and only requests
that come within `(p - q) / rate` seconds can pass one of priority q, so that
nothing starves.
"""

from jaxserve.schedulers import base


def priority_aging(rate: float = 0.1, chunk: int = 512) -> base.Scheduler:
  """Runs the highest effective priority; takes rows and pages of lower ones.

  Args:
    rate: Priority gained per second since submission.
    chunk: Tokens of one prompt that a step computes at most.

  Returns:
    The scheduler. Ties are broken by arrival.

  Raises:
    ValueError: `rate` is not positive, or `chunk` below 1.
  """
  if rate <= 0:
    raise ValueError(f'rate={rate} must be positive')
  if chunk < 1:
    raise ValueError(f'chunk={chunk} must be at least 1')

  # Growth since the same moment is common to all: it does not change the order.
  def rank(r):
    return rate * r.arrival_s - r.priority, r.arrival

  def schedule(requests, budget):
    ordered = sorted(requests, key=rank)
    return base.admit(ordered, budget, chunk, rank=rank, displace=True)

  return schedule
