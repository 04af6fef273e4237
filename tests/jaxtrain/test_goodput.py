"""Every second has one category, whatever nests and whoever is killed."""

import json

import hypothesis
from hypothesis import strategies as st
import pytest

from jaxtrain import goodput


class _Clock:
  """Seconds that pass only when told; the epoch is 1000 before them."""

  def __init__(self, now=0.0):
    self.time_s = now

  def __call__(self):
    return self.time_s

  def wall(self):
    return self.time_s + 1000.0


def _goodput(clock, workdir=None, **options):
  return goodput.Goodput(workdir, clock=clock, now=clock.wall, **options)


def _nonzero(seconds):
  return {name: s for name, s in seconds.items() if s}


def test_nested_contexts_pause_the_outer():
  clock = _Clock()
  record = _goodput(clock)
  clock.time_s += 1  # other
  with record.measure('step'):
    clock.time_s += 2
    with record.measure('evaluation'):
      clock.time_s += 4
      with record.measure('compile'):
        clock.time_s += 8
      clock.time_s += 16
    clock.time_s += 32
  expected = dict(other=1, step=34, evaluation=20, compile=8)
  assert _nonzero(record.seconds()) == expected
  assert record.fractions()['step'] == 34 / 63


def test_an_error_closes_its_context():
  clock = _Clock()
  record = _goodput(clock)
  with pytest.raises(KeyError), record.measure('data'):
    clock.time_s += 3
    raise KeyError
  clock.time_s += 1
  assert _nonzero(record.seconds()) == dict(data=3, other=1)


def test_a_wait_behind_which_a_step_ran_is_a_step():
  clock = _Clock()
  record = _goodput(clock)
  for hidden in (False, True):
    with record.measure('data') as wait:
      clock.time_s += 5
      assert record.seconds()['data'] == 5 + 5 * hidden
      if hidden:
        wait.count_as('step')
  assert _nonzero(record.seconds()) == dict(data=5, step=5)


@hypothesis.given(
  st.recursive(
    st.floats(0, 100),
    lambda inner: st.tuples(
      st.sampled_from(goodput.CATEGORIES), st.lists(inner, max_size=4)
    ),
    max_leaves=12,
  )
)
def test_categories_add_up_to_the_time_that_passed(tree):
  clock = _Clock()
  record = _goodput(clock)

  def run(node):
    if isinstance(node, float):
      clock.time_s += node
      return
    with record.measure(node[0]):
      for child in node[1]:
        run(child)

  run(tree)
  seconds = record.seconds()
  assert set(seconds) == set(goodput.CATEGORIES)
  assert sum(seconds.values()) == pytest.approx(clock.time_s)
  assert clock.time_s == 0 or sum(record.fractions().values()) == (
    pytest.approx(1)
  )


def _make_steps(record, clock, steps, seconds=2.0):
  with record.measure('step'):
    for step in steps:
      clock.time_s += seconds
      record.step_done(step)


def test_a_kill_is_restart_and_its_steps_are_lost(tmp_path):
  clock = _Clock()
  first = _goodput(clock, tmp_path)
  assert first.start_category == 'start'
  with first.measure('start'):
    clock.time_s += 3
  first.resumed(0)
  _make_steps(first, clock, range(1, 6))
  clock.time_s += 50  # Hangs in step 6 and is killed: nothing is noted.

  second = _goodput(clock, tmp_path)
  assert second.start_category == 'restart'
  with second.measure('restart'):
    clock.time_s += 4
  second.resumed(3)
  _make_steps(second, clock, range(4, 9))
  assert _nonzero(second.seconds()) == dict(restart=54, lost=4, step=6)
  second.end('steps')
  clock.time_s += 9  # After the end.

  record = goodput.read(tmp_path)
  assert _nonzero(record.seconds) == dict(start=3, step=16, restart=54, lost=4)
  assert sum(record.seconds.values()) == clock.time_s - 9
  assert record.fractions['step'] == 16 / 77
  killed, ended = record.incarnations
  assert (killed.ended, ended.ended) == (None, 'steps')
  assert (killed.first_step, killed.last_step, killed.lost_steps) == (0, 5, 0)
  assert (ended.first_step, ended.last_step, ended.lost_steps) == (3, 8, 2)
  assert (killed.start, killed.end) == (1000, 1013)
  assert (ended.start, ended.end) == (1063, 1077)


@pytest.mark.parametrize(
  'why, gap', [('steps', 0), ('data', 0), ('SIGTERM', 7)]
)
def test_a_run_that_was_finished_has_no_restart(tmp_path, why, gap):
  clock = _Clock()
  first = _goodput(clock, tmp_path)
  first.end(why)
  first.end('KeyError')  # The first reason stays.
  assert goodput.read(tmp_path).incarnations[0].ended == why
  clock.time_s += 7
  assert _goodput(clock, tmp_path).seconds()['restart'] == gap


def test_steps_lost_twice_are_lost_twice(tmp_path):
  clock = _Clock()
  for last in (4, 3, 5):
    record = _goodput(clock, tmp_path)
    record.resumed(0)
    _make_steps(record, clock, range(1, last + 1))
  assert [i.lost_steps for i in goodput.read(tmp_path).incarnations] == [
    0,
    3,
    4,
  ]


def test_the_file_is_not_written_every_step(tmp_path):
  clock = _Clock()
  record = _goodput(clock, tmp_path, write_every_s=10.0)
  record.resumed(0)
  _make_steps(record, clock, range(1, 8), seconds=3.0)
  # Written after 12 s; the context's end came 9 s later.
  assert goodput.read(tmp_path).incarnations[0].last_step == 4
  clock.time_s += 1
  with record.measure('checkpoint'):
    clock.time_s += 1
  assert goodput.read(tmp_path).incarnations[0].last_step == 7


def test_the_file_is_json_lines_without_gaps(tmp_path):
  clock = _Clock()
  for _ in range(2):
    record = _goodput(clock, tmp_path)
    clock.time_s += 1
    record.end('SIGTERM')
  lines = (tmp_path / 'goodput.jsonl').read_text().splitlines()
  assert [json.loads(line)['ended'] for line in lines] == ['SIGTERM'] * 2
  assert list(tmp_path.iterdir()) == [tmp_path / 'goodput.jsonl']


def test_no_file_is_no_time(tmp_path):
  assert goodput.read(tmp_path).incarnations == ()
  assert sum(goodput.read(tmp_path).fractions.values()) == 0


def test_unknown_categories_are_refused():
  record = _goodput(_Clock())
  with pytest.raises(ValueError, match="'steps' is not one of step, lost"):
    with record.measure('steps'):
      pass
  with record.measure('data') as wait:
    with pytest.raises(ValueError, match="'wait' is not one of"):
      wait.count_as('wait')
