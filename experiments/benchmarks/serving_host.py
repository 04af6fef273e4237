"""KV memory waste, and the host's work per step.

Lengths are as in ShareGPT: Kwon et al., https://arxiv.org/abs/2309.06180,
figure 11, means of 161 tokens in and 338 out, here log-normal. Waste is slots
of held pages without a token, over held slots, summed over steps.

Host work is the CPU time of the thread that calls `engine.step`, less what it
spends in the runner: dispatching to the device and waiting for it.
"""

import math
import random
import statistics
import time
from typing import Any

from experiments.benchmarks.peers import protocol
from experiments.benchmarks.serving_processes import run_once
from experiments.benchmarks.serving_settings import Settings
from experiments.benchmarks.serving_settings import emit
from jaxserve import LLM
from jaxserve import EngineConfig
from jaxserve import SamplingParams

_MEAN_PROMPT, _MEAN_NEW, _SIGMA = 161, 338, 1.0
_MAX_LEN = 2048
_ROWS = 64


def host(settings: Settings) -> dict[str, Any]:
  """Waste on the mix of lengths; host work at 64 running requests."""
  results = {}
  for what in ('waste', 'work'):
    job = settings.job(
      'qwen3-tiny',
      what=what,
      count=settings.count(128 if what == 'waste' else _ROWS),
    )
    results[what] = run_once('serving_host', job, settings.programs)
    emit(scenario='host', what=what, **results[what])
  return results


def measure(job: dict[str, Any]) -> dict[str, Any]:
  """One of both, in this process."""
  with LLM(
    job['model'],
    engine=EngineConfig(
      max_num_requests=_ROWS,
      max_seq_len=_MAX_LEN,
      page_size=16,
      max_step_tokens=512,
      **job['engine'],
    ),
  ) as llm:
    return {'waste': _waste, 'work': _work}[job['what']](llm, job['count'])


def _waste(llm, count):
  rng = random.Random(0)

  def length(mean, longest):
    mu = math.log(mean) - _SIGMA**2 / 2
    return min(longest, max(4, round(rng.lognormvariate(mu, _SIGMA))))

  for _ in range(count):
    prompt = [rng.randrange(4, 512) for _ in range(length(_MEAN_PROMPT, 1024))]
    new = length(_MEAN_NEW, _MAX_LEN - len(prompt))
    llm.engine.add_request(prompt, _params(new))
  while llm.engine.num_unfinished:
    llm.engine.step()
  metrics = llm.engine.metrics
  return dict(
    wasted_fraction=round(metrics.wasted_slots_fraction, 4),
    padding_fraction=round(metrics.padding_fraction, 4),
    steps=metrics.num_steps,
  )


def _work(llm, count):
  """Milliseconds per step while all rows decode."""
  in_runner = _time_runner(llm.runner)
  for i in range(count):
    llm.engine.add_request([4 + i] * 32, _params(400))
  while not _all_decode(llm.engine, count):
    llm.engine.step()
  host_ms, runner_ms, step_ms = [], [], []
  for _ in range(300):
    before, cpu, wall = in_runner[0], time.thread_time(), time.perf_counter()
    llm.engine.step()
    step_ms.append(1e3 * (time.perf_counter() - wall))
    runner_ms.append(1e3 * (in_runner[0] - before))
    host_ms.append(1e3 * (time.thread_time() - cpu) - runner_ms[-1])
  return dict(
    running=count,
    host_ms=round(statistics.median(host_ms), 3),
    host_mean_ms=round(statistics.mean(host_ms), 3),
    dispatch_and_read_ms=round(statistics.median(runner_ms), 3),
    step_wall_ms=round(statistics.median(step_ms), 3),
  )


def _params(max_tokens):
  return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


def _all_decode(engine, count):
  steps = engine.metrics.steps
  return bool(steps) and steps[-1].num_tokens == count


def _time_runner(runner):
  """Makes the runner's methods add their thread's CPU time to a sum."""
  total = [0.0]

  def timed(function):
    def call(*args, **kwargs):
      start = time.thread_time()
      result = function(*args, **kwargs)
      total[0] += time.thread_time() - start
      return result

    return call

  class Result:
    """A step's result whose methods, which wait, are timed too."""

    def __init__(self, result):
      self._result = result

    def __getattr__(self, name):
      value = getattr(self._result, name)
      return timed(value) if callable(value) else value

  run = timed(runner.run)
  runner.run = lambda *args, **kwargs: Result(run(*args, **kwargs))
  for name in ('set_row', 'set_masks', 'copy_pages', 'clear_pages'):
    setattr(runner, name, timed(getattr(runner, name)))
  return total


if __name__ == '__main__':
  protocol.once(measure)
