"""The machinery of the serving benchmark, not what it measures."""

import os
import pathlib
import random
import sys

import pytest

from experiments.benchmarks import serving_arrivals
from experiments.benchmarks import serving_models
from experiments.benchmarks import serving_processes
from experiments.benchmarks import serving_rounds
from experiments.benchmarks import serving_ties
from experiments.benchmarks.peers import protocol
from jaxserve.engine.outputs import Delta

_DRIVER = f"""
import sys
sys.path.insert(0, {str(pathlib.Path(protocol.__file__).parent)!r})
import protocol

def load(job):
  if job['absent']:
    import no_such_engine
  print('an engine that prints')
  def generate(prompts, max_tokens):
    return [p[-1:] * max_tokens for p in prompts]
  return generate

protocol.serve(load)
"""


@pytest.fixture
def driver(tmp_path):
  path = tmp_path / 'driver.py'
  path.write_text(_DRIVER)

  def start(absent=False):
    job = {'core': min(os.sched_getaffinity(0)), 'absent': absent}
    return serving_processes.Process([sys.executable, str(path)], job)

  return start


def test_a_driver_answers_whatever_its_engine_prints(driver):
  process = driver()
  reply = process.ask({'prompts': [[1, 2], [3]], 'max_tokens': 2})
  assert process.first_reply['ready']
  assert reply['tokens'] == [[2, 2], [3, 3]]
  assert reply['wall_s'] > 0
  with pytest.raises(serving_processes.EngineError, match='max_tokens'):
    process.ask({'prompts': [[1]]})
  process.close()


def test_an_engine_that_is_not_installed_says_so(driver):
  process = driver(absent=True)
  assert 'no_such_engine' in process.first_reply['absent']
  process.close()


class _Process:
  """An engine that takes the given CPU seconds, round by round."""

  start_s = 1.0
  first_reply = {'cpu_s': 1.0}

  def __init__(self, *seconds):
    self._seconds = list(seconds)

  def ask(self, request):
    s = self._seconds.pop(0)
    tokens = [[0] * request['max_tokens']] * len(request['prompts'])
    return {'tokens': tokens, 'wall_s': 2 * s, 'cpu_s': s}


def test_ratios_are_medians_of_rounds_and_the_first_is_cold():
  results = serving_rounds.measure(
    'test',
    {'onemesh': _Process(9, 1, 1.1, 1), 'peer': _Process(8, 2, 2.2, 2)},
    lambda i: [[1], [2]],
    5,
    3,
    lambda *_: {'near_ties': 1},
  )
  assert results['peer']['onemesh_cpu_ratio'] == 2
  assert results['peer']['rounds'] == 3
  assert results['peer']['near_ties'] == 4
  assert results['onemesh']['tokens_per_cpu_s'] == 10
  assert results['onemesh']['tokens_per_s'] == 5
  assert results['onemesh']['cold_tokens_per_cpu_s'] == round(10 / 9, 1)


def test_rounds_are_added_while_times_scatter():
  results = serving_rounds.measure(
    'test',
    {'onemesh': _Process(9, 1, 2, 1, 1, 1), 'peer': _Process(*[1] * 6)},
    lambda i: [[1]],
    1,
    2,
    lambda *_: {},
  )
  assert results['onemesh']['rounds'] == 4
  assert results['onemesh']['cpu_scatter'] == 1


class _Engine:
  """Gives every request a token a step."""

  def __init__(self):
    self.added = []
    self._left = {}

  @property
  def num_unfinished(self):
    return len(self._left)

  def add_request(self, prompt, params, *, priority, client, sink):
    self.added.append((tuple(prompt), client, priority))
    self._left[len(self.added)] = [params.max_tokens, sink]

  def step(self):
    for i, (left, sink) in list(self._left.items()):
      sink(Delta(i, 0, '', (7,)))
      self._left[i][0] = left - 1
      if left == 1:
        del self._left[i]


def test_arrivals_are_played_in_time_and_idle_time_is_skipped():
  engine = _Engine()
  late = serving_arrivals.Arrival(5000.0, [2], 3, client='b', priority=1)
  early = serving_arrivals.Arrival(1000.0, [1], 4, client='a')
  traces = serving_arrivals.play(engine, [late, early])
  assert engine.added == [((1,), 'a', 0), ((2,), 'b', 1)]
  assert [t.arrival for t in traces] == [early, late]
  assert [len(t.tokens_s) for t in traces] == [4, 3]
  for t in traces:
    assert 0 <= t.first_token_s < 10
    assert t.tokens_s == sorted(t.tokens_s)


def test_poisson_arrivals_have_their_rate():
  times = serving_arrivals.poisson(4.0, 4000, random.Random(0))
  assert times == sorted(times)
  assert times[-1] == pytest.approx(1000, rel=0.05)


def test_tokens_part_at_near_ties_or_differ(tmp_path, monkeypatch):
  model = serving_models.write_random(serving_models.QWEN3_TINY, tmp_path)
  ties = serving_ties.Ties(model.directory, 32)
  prompt = [5, 6, 7]
  logits = ties._logits(prompt)
  best, worst = int(logits.argmax()), int(logits.argmin())
  compare = lambda ours, theirs: ties([prompt], [ours], [theirs])
  assert compare([best], [best]) == {'near_ties': 0, 'differing': 0}
  assert compare([best], [worst]) == {'near_ties': 0, 'differing': 1}
  assert compare([best, 1], [best]) == {'near_ties': 0, 'differing': 1}
  second = sorted(range(512), key=lambda i: -logits[i])[1]
  gap = logits[best] - logits[second]
  monkeypatch.setattr(serving_ties, '_TIE', 1.01 * gap)
  assert compare([best], [second]) == {'near_ties': 1, 'differing': 0}
