"""How the serving benchmark talks to an engine: one process, JSON lines.

Imports the standard library only, so that it also runs in an interpreter that
has a peer and nothing of this project. A driver pins itself to one core before
any engine starts threads, keeps standard output for replies, and measures
itself: wall time, and CPU time of the whole process, which other work on the
machine disturbs far less.
"""

from collections.abc import Callable
import gc
import json
import os
import sys
import time

# Tokens of every prompt, number of new ones -> new tokens of every prompt.
Generate = Callable[[list[list[int]], int], list[list[int]]]


def serve(load: Callable[[dict], Generate]) -> None:
  """Loads an engine from the job in `argv[1]`, then answers line by line.

  The first reply is `{'ready': true, 'cpu_s': ...}`, or `{'absent': why}` if
  the engine is not installed or does not take this model. A request is
  `{'prompts': [[ids]], 'max_tokens': n}`, its reply `{'tokens': [[ids]],
  'wall_s': ..., 'cpu_s': ...}`.

  Args:
    load: Makes the engine. `NotImplementedError` says that it has no way to
      load this model.
  """
  job, reply = _start()
  try:
    generate = load(job)
  except (ImportError, NotImplementedError) as e:
    reply({'absent': str(e)})
    return
  reply({'ready': True, 'cpu_s': time.process_time()})
  for line in sys.stdin:
    request = json.loads(line)
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    tokens = generate(request['prompts'], request['max_tokens'])
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    reply({'tokens': tokens, 'wall_s': wall_s, 'cpu_s': cpu_s})


def once(measure: Callable[[dict], dict]) -> None:
  """Runs a measurement on the job in `argv[1]` and replies with its result."""
  job, reply = _start()
  reply(measure(job))


def _start():
  job = json.loads(sys.argv[1])
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {job['core']})
  # Engines print; what they print goes to standard error.
  replies = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)

  def reply(message):
    replies.write(json.dumps(message) + '\n')
    replies.flush()

  return job, reply
