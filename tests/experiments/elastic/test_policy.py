"""The supervisor's decisions, without processes and without time passing."""

import dataclasses
import signal

import hypothesis
from hypothesis import strategies as st
import pytest

from experiments.elastic import exit_codes
from experiments.elastic.actions import Discard
from experiments.elastic.actions import Finish
from experiments.elastic.actions import Kill
from experiments.elastic.actions import Observation
from experiments.elastic.actions import Recovered
from experiments.elastic.actions import Start
from experiments.elastic.actions import Stop
from experiments.elastic.policy import Limits
from experiments.elastic.policy import Policy
from experiments.elastic.vitals import Patience
from jaxtrain.heartbeat import Beat
from jaxtrain.sharding import elastic

_KILL, _ABORT = -signal.SIGKILL, -signal.SIGABRT
_LIMITS = Limits(
  settle_s=1, stop_s=50, regrow_after_s=100, max_restarts=5, backoff_s=1
)
_PATIENCE = Patience(hang_floor_s=20, hang_factor=10, slow_s=500, alive_s=10)


class _World:
  """Simulated slots: they beat until told otherwise; tests spoil them.

  Every look takes a second, in which every loop makes a step.
  """

  def __init__(self, num_slots=4, mesh='data=4', batch_size=12, **options):
    self.policy = Policy(
      mesh,
      num_slots=num_slots,
      devices_per_slot=options.pop('devices_per_slot', 1),
      batch_size=batch_size,
      limits=dataclasses.replace(_LIMITS, **options.pop('limits', {})),
      patience=_PATIENCE,
      **options,
    )
    self.time_s = 0.0
    self.plan = None
    self.beats, self.exits = {}, {}
    self.frozen, self.stuck = set(), set()
    self.saved, self.best = None, 0
    self.healthy, self.stop = None, False
    self.log = []

  def look(self, seconds=1.0):
    """Lets time pass, then the policy see; returns what it does."""
    self.time_s += seconds
    self._live()
    done = self.policy.observe(
      Observation(
        self.time_s,
        dict(self.exits),
        dict(self.beats),
        self.saved,
        self.healthy,
        self.stop,
      )
    )
    for action in done:
      self.log.append(action)
      if isinstance(action, Start):
        self._start(action)
      elif isinstance(action, Kill):
        self.plan = None
      elif isinstance(action, Stop):
        self.end('SIGTERM')
      elif isinstance(action, Discard):
        self.saved = min(self.saved or 0, action.after_step)
    return done

  def until(self, kind, looks=2000):
    """Looks until an action of a kind, which is returned."""
    for _ in range(looks):
      for action in self.look():
        if isinstance(action, kind):
          return action
    raise AssertionError(f'no {kind.__name__}: {self.log}')

  def steps(self, count=3):
    """Lets so many seconds pass in which nothing is done."""
    for _ in range(count):
      done = self.look()
      assert not [a for a in done if not isinstance(a, Recovered)], done

  def end(self, why, code=0):
    for slot in self.plan.slots:
      self.beats[slot] = dataclasses.replace(self.beats[slot], ended=why)
      self.exits[slot] = code
    self.saved = self.beats[self.plan.slots[0]].step

  def fingerprint(self, **sums):
    """`s0='a'`: process 0 reports checksum a of the only group."""
    for name, value in sums.items():
      slot = int(name[1:])
      beat = self.beats[slot]
      prints = {beat.step: {'g': tuple(map(ord, value))}}
      self.beats[slot] = dataclasses.replace(
        beat, fingerprints={**beat.fingerprints, **prints}
      )

  def _start(self, plan):
    self.plan, self.exits = plan, {}
    self.frozen, self.stuck = set(), set()
    start = self.saved or 0
    self.beats = {
      s: Beat(step=start, first_step=start, phase='device') for s in plan.slots
    }

  def _live(self):
    """One step, unless somebody keeps the others waiting."""
    if self.plan is None:
      return
    waiting = self.frozen | self.stuck | set(self.exits)
    for slot in self.plan.slots:
      beat = self.beats[slot]
      if slot in self.frozen | set(self.exits):
        continue
      beat = dataclasses.replace(beat, alive=beat.alive + 1)
      if not waiting:
        beat = dataclasses.replace(beat, step=beat.step + 1, loop=beat.loop + 1)
      self.beats[slot] = beat


@pytest.fixture
def world():
  world = _World()
  assert world.look() == [Start((0, 1, 2, 3), 'data=4', 1)]
  world.steps(5)
  return world


def test_a_run_that_ends(world):
  world.end('steps')
  kill, finish = world.look()
  assert kill == Kill('finished', (), 5)
  assert finish.code == 0 and 'step 5' in finish.message
  assert world.look() == []
  assert world.log[1] == Recovered(0, 0, 0.0)


def test_data_that_ends(world):
  world.end('data')
  assert world.until(Finish).code == 0


def test_killed_process_is_expelled_and_comes_back(world):
  world.saved = 3
  world.exits[1] = _KILL
  assert world.look() == []  # Others may show more.
  kill = world.until(Kill)
  assert kill.lost == (1,) and kill.step == 5 and 'signal 9' in kill.why
  killed_at = world.time_s
  start = world.until(Start)
  assert world.time_s - killed_at == _LIMITS.backoff_s
  # Three of four: the batch of 12 divides, a part of it grows from 3 to 4.
  assert start == Start((0, 2, 3), 'data=3', 2)
  recovered = world.until(Recovered)
  assert (recovered.first_step, recovered.lost_steps) == (3, 2)
  assert recovered.seconds == world.time_s - killed_at
  assert world.policy.lost == {1}
  # Long enough after, at the next checkpoint, all are stopped.
  world.steps(98)
  world.saved = 100
  stop = world.until(Stop, looks=2)
  assert 'data=4' in stop.why and world.time_s - killed_at >= 100
  assert world.until(Start, looks=3) == Start((0, 1, 2, 3), 'data=4', 1)
  assert world.until(Recovered).lost_steps == 0
  assert not world.policy.lost
  world.end('steps')
  assert world.until(Finish).code == 0


def test_without_a_checkpoint_it_does_not_grow(world):
  world.exits[1] = _KILL
  world.until(Recovered)
  world.steps(300)


def test_a_slot_that_fails_again_waits_twice_as_long(world):
  for wait in (100, 200):
    world.exits[1] = _KILL
    world.until(Kill)
    killed_at = world.time_s
    while not isinstance(world.log[-1], Stop):
      world.saved = (world.saved or 0) + 1
      world.look()
    assert world.time_s - killed_at == pytest.approx(wait, abs=3)
    world.until(Recovered)


@pytest.mark.parametrize(
  'exits, lost',
  [
    # What a peer's death does to the others is not held against them.
    ({0: _ABORT, 1: _KILL, 2: 1, 3: 1}, (1,)),
    ({2: -signal.SIGSEGV, 3: _ABORT}, (2,)),
    ({2: 1}, (2,)),
    ({2: 1, 3: _ABORT}, (2,)),
    ({1: _KILL, 2: _KILL, 3: _ABORT}, (1, 2)),
    # Nobody in particular.
    ({0: _ABORT, 3: _ABORT}, ()),
    ({0: 1, 1: 1, 2: 1, 3: 1}, ()),
    ({s: _KILL for s in range(4)}, ()),
  ],
)
def test_who_is_to_blame_for_exits(world, exits, lost):
  world.exits.update(exits)
  assert world.until(Kill).lost == lost
  left = tuple(s for s in range(4) if s not in lost)
  assert world.until(Start).slots == left


def test_who_dies_of_another_says_so(world):
  for slot, error in enumerate(['JaxRuntimeError', 'OSError']):
    world.beats[slot] = dataclasses.replace(world.beats[slot], error=error)
  world.exits.update({0: 1, 2: _ABORT, 3: _ABORT})
  assert world.until(Kill).lost == (1,)  # Which still runs.


def test_an_error_is_seen_before_the_process_ends(world):
  world.stuck.update(range(4))
  world.beats[3] = dataclasses.replace(world.beats[3], error='KeyError')
  kill = world.until(Kill, looks=4)
  assert kill.lost == (3,) and 'process 3: exit code 1' in kill.why


def test_a_loss_that_is_not_finite_is_seen_before_the_process_ends(world):
  world.stuck.update(range(4))
  world.beats[3] = dataclasses.replace(world.beats[3], error='NonFiniteError')
  assert 'step 6 is not finite' in world.until(Kill, looks=4).why


def test_a_process_that_is_stopped_is_found_by_its_silence(world):
  world.frozen.add(2)
  kill = world.until(Kill)
  assert kill.lost == (2,) and 'no sign of life' in kill.why
  assert world.time_s == pytest.approx(6 + _PATIENCE.alive_s, abs=1)
  assert world.until(Start).slots == (0, 1, 3)


@pytest.mark.parametrize('phase', ['data', 'step'])
def test_a_loop_that_hangs_is_found_by_where_it_stands(world, phase):
  world.stuck.add(3)
  beat = world.beats[3]
  world.beats[3] = dataclasses.replace(beat, phase=phase)
  kill = world.until(Kill)
  assert kill.lost == (3,)
  assert world.time_s == pytest.approx(6 + _PATIENCE.hang_floor_s, abs=1)


def test_a_loop_that_is_a_step_behind(world):
  world.stuck.add(0)
  beat = world.beats[0]
  world.beats[0] = dataclasses.replace(beat, step=beat.step - 1)
  assert world.until(Kill).lost == (0,)


@pytest.mark.parametrize('phase', ['data', 'device'])
def test_a_deadlock_is_nobodys_fault(world, phase):
  world.stuck.update(range(4))
  for slot, beat in world.beats.items():
    world.beats[slot] = dataclasses.replace(beat, phase=phase)
  kill = world.until(Kill)
  assert kill.lost == () and 'nobody knows' in kill.why
  assert world.until(Start) == Start((0, 1, 2, 3), 'data=4', 1)


def test_slow_steps_are_waited_for():
  world = _World()
  world.look()
  for _ in range(10):  # A minute each.
    assert not [a for a in world.look(60) if not isinstance(a, Recovered)]
  world.stuck.add(3)
  beat = world.beats[3]
  world.beats[3] = dataclasses.replace(beat, phase='data')
  hung_at = world.time_s
  assert world.until(Kill).lost == (3,)
  assert world.time_s - hung_at == pytest.approx(600, abs=2)


@pytest.mark.parametrize('phase', ['compile', 'evaluation', 'checkpoint'])
def test_slow_phases_are_waited_for_by_all(world, phase):
  world.stuck.add(1)
  beat = world.beats[1]
  world.beats[1] = dataclasses.replace(beat, phase=phase)
  world.steps(498)
  assert world.until(Kill, looks=5).lost == (1,)


def test_the_first_step_is_waited_for():
  world = _World()
  world.look()
  world.stuck.update(range(4))
  world.steps(499)
  assert world.until(Kill, looks=5).lost == ()


def test_a_process_that_never_beats():
  world = _World()
  world.look()
  del world.beats[2]

  def live():
    for slot, beat in world.beats.items():
      world.beats[slot] = dataclasses.replace(beat, alive=beat.alive + 1)

  world._live = live
  assert world.until(Kill).lost == (2,)
  assert world.time_s == pytest.approx(_PATIENCE.slow_s + 2, abs=1)


def test_the_odd_one_out_is_expelled_and_what_it_saved_discarded(world):
  world.fingerprint(s0='a', s1='a', s2='a', s3='a')
  world.steps(2)  # Agreed at step 5.
  world.saved = 7
  # Before they are looked at they agree once more, at step 7.
  world.fingerprint(s0='a', s1='a', s2='a', s3='a')
  world._live()
  world.fingerprint(s0='a', s1='a', s2='b', s3='a')
  kill, discard = world.look()
  assert kill.lost == (2,) and 'differ' in kill.why
  assert discard == Discard(7)
  assert world.until(Start) == Start((0, 1, 3), 'data=3', 2)
  recovered = world.until(Recovered)
  assert (recovered.first_step, recovered.lost_steps) == (7, 2)


def test_a_process_whose_own_devices_differ_needs_no_majority():
  world = _World(num_slots=2, mesh='data=4', devices_per_slot=2)
  world.look()
  world.steps()
  world.fingerprint(s0='a', s1='ab')
  assert world.until(Kill).lost == (1,)


def test_two_that_differ_start_again_from_where_they_agreed():
  world = _World(num_slots=2, mesh='data=2')
  world.look()
  world.saved = 0
  world.steps()
  world.fingerprint(s0='a', s1='b')
  kill, discard = world.look()
  assert kill.lost == () and 'nobody knows' in kill.why
  assert discard == Discard(0)
  assert world.until(Start).slots == (0, 1)


def test_fingerprints_of_different_steps_are_not_compared(world):
  world.fingerprint(s0='a', s1='a', s2='a')
  world.steps(1)
  world.fingerprint(s3='b')
  world.steps(3)


def test_a_loss_that_is_not_finite_is_tried_again_once(world):
  world.saved = 4
  world.end(None, exit_codes.NON_FINITE)
  world.saved = 4
  kill = world.until(Kill)
  assert kill.lost == () and 'step 6 is not finite' in kill.why
  assert world.until(Start).slots == (0, 1, 2, 3)
  world.look()  # Step 5 again.
  world.end(None, exit_codes.NON_FINITE)
  finish = world.until(Finish)
  assert finish.code == exit_codes.POISONED
  assert 'step 6' in finish.message and 'non_finite_step_6' in finish.message


def test_another_step_that_is_not_finite_is_another_matter(world):
  world.end(None, exit_codes.NON_FINITE)
  world.saved = 4
  world.until(Start)
  world.steps(3)
  world.exits.update({0: exit_codes.NON_FINITE, 1: 1, 2: _ABORT})
  kill = world.until(Kill)
  assert 'step 8 is not finite' in kill.why and kill.lost == ()


def test_wrong_arguments_are_not_tried_again():
  world = _World()
  world.look()
  world.exits.update({s: exit_codes.WRONG for s in range(4)})
  assert world.until(Finish).code == exit_codes.WRONG


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


def test_old_failures_are_forgotten():
  world = _World(limits=dict(max_restarts=1, window_s=1000))
  world.look()
  for _ in range(4):
    world.steps(1500)
    world.saved = world.policy._step()
    world.exits.update({s: 1 for s in world.plan.slots})
    world.until(Start)
  world.exits.update({s: 1 for s in world.plan.slots})
  assert world.until(Finish).code == exit_codes.GAVE_UP


def test_too_few_wait_for_those_that_may_return():
  world = _World(num_slots=2, mesh='data=1,tensor=2')
  assert world.look() == [Start((0, 1), 'data=1,tensor=2', 1)]
  world.steps()
  world.exits[0] = _KILL
  world.until(Kill)
  killed_at = world.time_s
  assert world.until(Start).slots == (0, 1)
  assert world.time_s - killed_at == 100


def test_too_few_that_never_return():
  world = _World(
    num_slots=2, mesh='data=1,tensor=2', limits=dict(regrow_after_s=None)
  )
  world.look()
  world.steps()
  world.exits[0] = _KILL
  finish = world.until(Finish)
  assert finish.code == exit_codes.TOO_FEW and '1 of 2' in finish.message


def test_a_lost_slot_that_says_it_is_well():
  world = _World(limits=dict(regrow_after_s=None))
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


def test_a_spare_takes_over_at_once():
  world = _World(num_slots=5, mesh='data=4')
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


def test_signal_while_nothing_runs():
  world = _World()
  world.stop = True
  assert world.until(Finish).code == exit_codes.STOPPED


def test_trainers_that_do_not_stop_are_killed(world):
  world.stop = True
  world.end = lambda why: world.frozen.add(1)
  world.look()
  stopped_at = world.time_s
  kill = world.until(Kill)
  assert world.time_s - stopped_at == pytest.approx(_LIMITS.stop_s, abs=2)
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
  world.steps(_LIMITS.stop_s)
  assert [a.code for a in world.until(Kill) and world.log[-1:]] == [0]


@pytest.mark.parametrize(
  'arguments, message',
  [
    (dict(mesh='data=6'), '4 processes of 1 devices have 4'),
    (dict(mesh='data=-1'), 'no size to shrink from'),
    (dict(batch_size=13), 'batch_size=13'),
  ],
)
def test_impossible_runs_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    _World(**arguments)


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
def test_whatever_happens(events):
  """No trainer is started while others run, or where one was just lost."""
  world = _World(limits=dict(max_restarts=4))
  running, stopping, lost = False, False, {}
  seen = 0

  def check():
    nonlocal running, stopping, seen
    for action in world.log[seen:]:
      if isinstance(action, Start):
        assert not running or stopping
        assert all(
          world.time_s - lost.get(s, -1e9) >= _LIMITS.regrow_after_s
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
  for _ in range(3 * int(_LIMITS.stop_s) + 10):
    world.look()
    check()
  assert isinstance(world.log[-1], Finish)
