"""Engines take turns, round by round, on the same prompts.

Prompts are new in every round, so that an engine with a prefix cache finds only
what the scenario shares; their lengths are those of every round. The first
round is reported as cold. Rounds are added while some engine's CPU times are
further apart than `_MAX_SCATTER`.
"""

from collections.abc import Callable
import statistics
from typing import Any

from experiments.benchmarks.serving_processes import Process
from experiments.benchmarks.serving_settings import emit

_MAX_SCATTER = 0.15
_OURS = 'onemesh'


def measure(
  scenario: str,
  engines: dict[str, Process],
  prompts_of: Callable[[int], list[list[int]]],
  max_tokens: int,
  rounds: int,
  check: Callable[[list[list[int]], list[list[int]], list[list[int]]], dict],
) -> dict[str, Any]:
  """Runs the rounds.

  Args:
    scenario: For the JSON lines.
    engines: By name, 'onemesh' among them.
    prompts_of: Prompts of a round.
    max_tokens: Generated per prompt.
    rounds: Warm rounds; as many again if times scatter.
    check: `(prompts, ours, theirs) -> counts`: compares tokens.

  Returns:
    Per engine: speeds, scatter, and our speed over its, median of the rounds.
  """
  log = {name: [] for name in engines}
  checks = {name: [] for name in engines if name != _OURS}
  for i in range(1 + 2 * rounds):
    if i > rounds and max(_scatter(log[n][1:]) for n in log) <= _MAX_SCATTER:
      break
    prompts = prompts_of(i)
    tokens = {}
    # Whoever goes first in one round goes last in another.
    order = list(engines) if i % 2 else list(engines)[::-1]
    for name in order:
      reply = engines[name].ask({'prompts': prompts, 'max_tokens': max_tokens})
      tokens[name] = reply.pop('tokens')
      reply['num_tokens'] = sum(map(len, tokens[name]))
      log[name].append(reply)
      emit(scenario=scenario, engine=name, round=i, cold=i == 0, **reply)
    for name in checks:
      checks[name].append(check(prompts, tokens[_OURS], tokens[name]))
  return {
    name: _summary(engines[name], log[name], log[_OURS])
    | {k: sum(c[k] for c in checks.get(name, ())) for k in _keys(checks, name)}
    for name in engines
  }


def _keys(checks, name):
  return checks[name][0] if checks.get(name) else ()


def _scatter(log):
  cpu = [r['cpu_s'] for r in log]
  return (max(cpu) - min(cpu)) / statistics.median(cpu)


def _speed(reply, clock):
  return reply['num_tokens'] / reply[clock]


def _summary(process, log, ours):
  warm = log[1:]
  median = lambda clock: statistics.median(_speed(r, clock) for r in warm)
  ratio = lambda clock: statistics.median(
    _speed(mine, clock) / _speed(theirs, clock)
    for mine, theirs in zip(ours[1:], warm, strict=True)
  )
  return dict(
    tokens_per_cpu_s=round(median('cpu_s'), 1),
    tokens_per_s=round(median('wall_s'), 1),
    cold_tokens_per_cpu_s=round(_speed(log[0], 'cpu_s'), 1),
    onemesh_cpu_ratio=round(ratio('cpu_s'), 3),
    onemesh_wall_ratio=round(ratio('wall_s'), 3),
    cpu_scatter=round(_scatter(warm), 3),
    rounds=len(warm),
    start_s=round(process.start_s, 1),
    start_cpu_s=round(process.first_reply['cpu_s'], 1),
  )
