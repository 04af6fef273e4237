"""Seconds from a new process to its first token, Gemma 3 270M.

Cold: the first process, with an empty compilation cache. Warm: later ones. The
model's weights are read from a file either way.
"""

import pathlib
import statistics
import tempfile
import time
from typing import Any

# This module's imports are part of what is measured: see `measure`.
_STARTED = time.perf_counter()

from experiments.benchmarks.peers import protocol


def startup(settings) -> dict[str, Any]:
  """One cold start, then warm ones."""
  from experiments.benchmarks.serving_processes import run_once
  from experiments.benchmarks.serving_settings import emit

  starts = []
  with tempfile.TemporaryDirectory(dir=settings.directory) as cache:
    for i in range(1 + settings.rounds):
      job = settings.job('gemma3-270m')
      spawned = time.perf_counter()
      phases = run_once('serving_startup', job, pathlib.Path(cache))
      phases['process_s'] = time.perf_counter() - spawned
      emit(scenario='startup', cold=i == 0, **phases)
      starts.append(phases)
  cold, *warm = starts
  rounded = lambda phases: {k: round(v, 2) for k, v in phases.items()}
  median = {k: statistics.median(w[k] for w in warm) for k in cold}
  return dict(cold=rounded(cold), warm=rounded(median))


def measure(job: dict[str, Any]) -> dict[str, float]:
  """Starts, generates a token, and tells the seconds of each phase.

  `first_token_s` is all of it, `cpu_s` its CPU time: the time on an idle core.
  """
  from jaxserve import LLM
  from jaxserve import EngineConfig
  from jaxserve import SamplingParams

  imported = time.perf_counter()
  llm = LLM(
    job['model'],
    engine=EngineConfig(
      max_num_requests=32,
      max_seq_len=1024,
      **job['engine'],
    ),
  )
  ready = time.perf_counter()
  params = SamplingParams(max_tokens=1, temperature=0)
  llm.generate([[2, 5, 9]], params, show_progress=False)
  done = time.perf_counter()
  return dict(
    import_s=imported - _STARTED,
    engine_s=ready - imported,
    of_which_compile_s=llm.runner.compile_s,
    token_s=done - ready,
    first_token_s=done - _STARTED,
    cpu_s=time.process_time(),
  )


if __name__ == '__main__':
  protocol.once(measure)
