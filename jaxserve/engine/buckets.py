"""Which token buckets to compile for, given what steps cost and how long they
are: an optimal partition of the line into at most k intervals.

Bellman, "The Theory of Dynamic Programming", Bull. Amer. Math. Soc. 60, 1954
(stage by stage, a stage being one more program); the problem is that of the
optimal quantiser of Bruce, "Optimum Quantization", MIT report 429, 1965.
"""

from collections.abc import Mapping
import math
import time

from jaxserve.engine.runner import Runner

_MIN_RUNS = 3
_MIN_S = 0.2


def choose_buckets(
  cost_of_bucket: Mapping[int, float],
  histogram: Mapping[int, float],
  max_programs: int,
  *,
  reach: int = 1,
) -> tuple[int, ...]:
  """The buckets with the smallest expected cost of a step.

  A step of n tokens runs in the smallest chosen bucket of at least n.

  Args:
    cost_of_bucket: Candidates: tokens -> cost of a step, such as seconds.
    histogram: Tokens of a step -> how often.
    max_programs: Buckets to choose at most.
    reach: The largest chosen bucket has at least so many tokens, whether or not
      the histogram has a step as long.

  Returns:
    At most `max_programs` candidates, in ascending order; of equally good
    choices one with the fewest.

  Raises:
    ValueError: No candidate reaches the longest step, or `max_programs` is 0.
  """
  sizes = sorted(cost_of_bucket)
  longest = max([reach, *(n for n, weight in histogram.items() if weight > 0)])
  if max_programs < 1 or not sizes or sizes[-1] < longest:
    raise ValueError(
      f'none of the buckets {sizes} holds steps of {longest} tokens, in at '
      f'most {max_programs} programs'
    )
  # weight[j]: how often a step has at most sizes[j] tokens.
  weight = [
    math.fsum(w for n, w in histogram.items() if n <= size) for size in sizes
  ]
  # best[j]: cost of all steps up to sizes[j], with it as the largest bucket.
  best = [cost_of_bucket[s] * w for s, w in zip(sizes, weight, strict=True)]
  chosen = [(s,) for s in sizes]
  ends = [j for j, size in enumerate(sizes) if size >= longest]
  answer = min((best[j], chosen[j]) for j in ends)
  for _ in range(max_programs - 1):
    # In place, largest first: smaller ones are still of a program less.
    for j in range(len(sizes) - 1, -1, -1):
      for i in range(j):
        cost = best[i] + cost_of_bucket[sizes[j]] * (weight[j] - weight[i])
        if cost < best[j]:
          best[j], chosen[j] = cost, (*chosen[i], sizes[j])
    answer = min([answer, *((best[j], chosen[j]) for j in ends)], key=_cost)
  return answer[1]


def measure_costs(runner: Runner) -> dict[int, float]:
  """Seconds of a step of each bucket of a runner, all of it padding.

  What a token costs beyond its padding, such as its attention, is the same in
  every bucket, and does not matter to `choose_buckets`.
  """
  costs = {}
  for num_tokens, layout in runner.layouts.items():
    runner.run(layout, layout.empty()[0]).read()
    times, start = [], time.perf_counter()
    while len(times) < _MIN_RUNS or time.perf_counter() - start < _MIN_S:
      begin = time.perf_counter()
      runner.run(layout, layout.empty()[0]).read()
      times.append(time.perf_counter() - begin)
    costs[num_tokens] = min(times)
  return costs


def _cost(choice):
  cost, buckets = choice
  return cost, len(buckets)
