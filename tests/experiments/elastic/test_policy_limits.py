"""How often and how long the supervisor tries, and when it ends."""

import dataclasses
import signal

import hypothesis
from hypothesis import strategies as st
import pytest

from experiments.elastic import exit_codes
from experiments.elastic.actions import Finish
from experiments.elastic.actions import Kill
from experiments.elastic.actions import Recovered
from experiments.elastic.actions import Start
from experiments.elastic.actions import Stop
from jaxtrain.sharding import elastic

_KILL, _ABORT = -signal.SIGKILL, -signal.SIGABRT


def test_failures_without_progress_wait_longer_and_longer(world):
  waits = []
  for _ in range(5):
    world.exits.update({s: 1 for s in world.plan.slots})
    world.until(Kill)
    failed_at = world.time_s
    world.until(Start)
    waits.append(world.time_s - failed_at)
  assert waits == [1, 2, 4, 8, 16]
  world.exits.update({s: 1 for s in world.plan.slots})
  finish = world.until(Finish)
  assert finish.code == exit_codes.GAVE_UP and '6 failures' in finish.message


def test_old_failures_are_forgotten(new_world):
  world = new_world(limits=dict(max_restarts=1, window_s=1000))
  world.look()
  for _ in range(4):
    world.steps(1500)
    world.saved = world.policy._step()
    world.exits.update({s: 1 for s in world.plan.slots})
    world.until(Start)
  world.exits.update({s: 1 for s in world.plan.slots})
  assert world.until(Finish).code == exit_codes.GAVE_UP


def test_too_few_wait_for_those_that_may_return(new_world):
  world = new_world(num_slots=2, mesh='data=1,tensor=2')
  assert world.look() == [Start((0, 1), 'data=1,tensor=2', 1)]
  world.steps()
  world.exits[0] = _KILL
  world.until(Kill)
  killed_at = world.time_s
  assert world.until(Start).slots == (0, 1)
  assert world.time_s - killed_at == 100


def test_too_few_that_never_return(new_world):
  world = new_world(
    num_slots=2, mesh='data=1,tensor=2', limits=dict(regrow_after_s=None)
  )
  world.look()
  world.steps()
  world.exits[0] = _KILL
  finish = world.until(Finish)
  assert finish.code == exit_codes.TOO_FEW and '1 of 2' in finish.message


def test_a_lost_slot_that_says_it_is_well(new_world):
  world = new_world(limits=dict(regrow_after_s=None))
  world.healthy = frozenset()
  world.look()
  world.steps()
  world.exits[1] = _KILL
  world.until(Recovered)
  world.saved = 1
  world.steps(200)
  world.healthy = frozenset({1})
  world.look()
  world.saved = 2
  world.until(Stop, looks=2)
  assert world.until(Start).slots == (0, 1, 2, 3)


def test_a_spare_takes_over_at_once(new_world):
  world = new_world(num_slots=5, mesh='data=4')
  assert world.look() == [Start((0, 1, 2, 3), 'data=4', 1)]
  world.steps()
  world.exits[2] = _KILL
  assert world.until(Start) == Start((0, 1, 3, 4), 'data=4', 1)


def test_a_machine_that_is_taken_away(world):
  """One process gets SIGTERM; all save and end."""
  world.end('a signal to another process')
  world.beats[2] = dataclasses.replace(world.beats[2], ended='SIGTERM')
  kill = world.until(Kill)
  assert kill.lost == (2,) and 'told to stop' in kill.why
  assert world.until(Start).slots == (0, 1, 3)
  assert world.until(Recovered).lost_steps == 0


def test_signal_stops_the_trainers(world):
  world.stop = True
  assert world.until(Stop, looks=1).why == 'a signal'
  finish = world.until(Finish)
  assert finish.code == exit_codes.STOPPED and 'step' in finish.message


def test_signal_while_nothing_runs(new_world):
  world = new_world()
  world.stop = True
  assert world.until(Finish).code == exit_codes.STOPPED


def test_trainers_that_do_not_stop_are_killed(world):
  world.stop = True
  world.end = lambda why: world.frozen.add(1)
  world.look()
  stopped_at = world.time_s
  kill = world.until(Kill)
  assert world.time_s - stopped_at == pytest.approx(world.limits.stop_s, abs=2)
  finish = world.log[-1]
  assert kill.why == 'stopping' and finish.code == exit_codes.STOPPED
  assert 'process 0, 1, 2, 3 not in time' in finish.message


def test_the_last_step_while_stopping_is_the_end(world):
  world.stop = True
  end = world.end
  world.end = lambda why: end('steps')
  world.look()
  assert world.until(Finish).code == 0


def test_a_process_that_dies_while_growing(world):
  world.exits[1] = _KILL
  world.until(Recovered)
  world.end = lambda why: world.exits.update({3: _KILL})
  while not isinstance(world.log[-1], Stop):
    world.saved = (world.saved or 0) + 1
    world.look()
  kill = world.until(Kill)
  assert kill.lost == (3,)
  # The one that had returned is used at once.
  assert world.until(Start).slots == (0, 1, 2)


def test_a_last_process_that_does_not_end(world):
  for slot in (0, 1, 2):
    world.exits[slot] = 0
    world.beats[slot] = dataclasses.replace(world.beats[slot], ended='steps')
  world.steps(world.limits.stop_s)
  assert [a.code for a in world.until(Kill) and world.log[-1:]] == [0]


@pytest.mark.parametrize(
  'arguments, message',
  [
    (dict(mesh='data=6'), '4 processes of 1 devices have 4'),
    (dict(mesh='data=-1'), 'no size to shrink from'),
    (dict(batch_size=13), 'batch_size=13'),
  ],
)
def test_impossible_runs_are_refused(new_world, arguments, message):
  with pytest.raises(ValueError, match=message):
    new_world(**arguments)


def test_it_says_where_it_stands(world):
  assert world.policy.describe() == (
    'running at step 5 on data=4 with all processes'
  )
  world.exits[1] = _KILL
  world.until(Kill)
  assert world.policy.describe() == 'idle at step 5 without 1'


_EVENTS = st.one_of(
  st.tuples(st.just('look'), st.integers(1, 130)),
  st.tuples(st.just('exit'), st.sampled_from([_KILL, _ABORT, 0, 1, 2, 3])),
  st.sampled_from([('freeze', 0), ('stick', 0), ('flip', 0), ('save', 0)]),
  st.sampled_from([('end', 'steps'), ('end', 'SIGTERM'), ('stop', 0)]),
)


@hypothesis.settings(max_examples=100)
@hypothesis.given(st.lists(st.tuples(st.integers(0, 3), _EVENTS), max_size=12))
def test_whatever_happens(new_world, events):
  """No trainer is started while others run, or where one was just lost."""
  world = new_world(limits=dict(max_restarts=4))
  running, stopping, lost = False, False, {}
  seen = 0

  def check():
    nonlocal running, stopping, seen
    for action in world.log[seen:]:
      if isinstance(action, Start):
        assert not running or stopping
        assert all(
          world.time_s - lost.get(s, -1e9) >= world.limits.regrow_after_s
          for s in action.slots
        )
        assert len(action.slots) == elastic.size(action.mesh)
        running, stopping = True, False
      elif isinstance(action, Kill):
        assert running
        assert len(action.lost) < 4
        lost.update(dict.fromkeys(action.lost, world.time_s))
        running = False
      elif isinstance(action, Stop):
        assert running and not stopping
        stopping = True  # They end by themselves.
      elif isinstance(action, Finish):
        assert action is world.log[-1]
    seen = len(world.log)

  for slot, (kind, value) in events:
    if world.plan is not None and slot in world.plan.slots:
      if kind == 'exit':
        world.exits[slot] = value
      elif kind == 'freeze':
        world.frozen.add(slot)
      elif kind == 'stick':
        world.stuck.add(slot)
      elif kind == 'flip':
        world.fingerprint(**{f's{s}': 'a' for s in world.plan.slots})
        world.fingerprint(**{f's{slot}': 'b'})
      elif kind == 'save':
        world.saved = world.beats[slot].step
      elif kind == 'end':
        world.end(value)
    world.stop |= kind == 'stop'
    for _ in range(value if kind == 'look' else 1):
      world.look()
      check()
  # Whatever it was, it comes to an end once it is asked to stop.
  world.stop = True
  for _ in range(3 * int(world.limits.stop_s) + 10):
    world.look()
    check()
  assert isinstance(world.log[-1], Finish)
