"""Runs one case of the schedulers' benchmark; defines no flags."""

import dataclasses
import time

from experiments.benchmarks import scheduler_cases
from jaxserve.simulate import metrics
from jaxserve.simulate.simulator import Result
from jaxserve.simulate.simulator import simulate


def run_case(name: str, case: scheduler_cases.Case) -> list[dict]:
  """Simulates every contender, prints a table, returns a record of each."""
  print(f'\n{name}: {case.about}\n{len(case.arrivals)} requests')
  print(f'{"":<22}' + ''.join(f'{short(f):>17}' for f in case.figures))
  records = []
  for label, make in case.contenders.items():
    start = time.perf_counter()
    result = simulate(make(), case.arrivals, case.machine)
    counted = [s for s in result.served if case.counts(s)]
    summary = dataclasses.asdict(
      metrics.summary(Result(counted, result.steps), case.objective)
    )
    if len(counted) < len(result.served):
      # Of the whole run, whoever is counted.
      everybody = dataclasses.asdict(metrics.summary(result, case.objective))
      for figure in ('tokens_per_s', 'prefilled_fraction', 'num_preemptions'):
        summary[figure] = everybody[figure]
    summary = {k: float(f'{v:.4g}') for k, v in summary.items()}
    print(
      f'{label:<22}' + ''.join(f'{summary[f]:>17.4g}' for f in case.figures)
    )
    records.append(
      dict(
        benchmark='schedulers',
        case=name,
        scheduler=label,
        num_requests=len(case.arrivals),
        drawn=case.figures[0],
        **summary,
        simulated_s=float(f'{result.steps[-1].end_s:.4g}'),
        wall_s=round(time.perf_counter() - start, 1),
      )
    )
  return records


def short(figure: str) -> str:
  """Name of a figure, as a heading."""
  return (
    figure.replace('between_tokens', 'TBT')
    .replace('first_token', 'TTFT')
    .replace('_fraction', '')
    .removesuffix('_s')
    .replace('tokens_per', 'tokens/s')
    .replace('_', ' ')
  )
