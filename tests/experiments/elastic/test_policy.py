"""What the supervisor makes of failures, without processes or time."""

import dataclasses
import signal

import pytest

from experiments.elastic import exit_codes
from experiments.elastic.actions import Discard
from experiments.elastic.actions import Finish
from experiments.elastic.actions import Kill
from experiments.elastic.actions import Recovered
from experiments.elastic.actions import Start
from experiments.elastic.actions import Stop

_KILL, _ABORT = -signal.SIGKILL, -signal.SIGABRT


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
  assert world.time_s - killed_at == world.limits.backoff_s
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
  assert world.time_s == pytest.approx(6 + world.patience.alive_s, abs=1)
  assert world.until(Start).slots == (0, 1, 3)


def test_silence_counts_before_the_place(new_world):
  world = new_world(patience=dict(alive_s=100))
  world.look()
  world.steps()
  world.frozen.add(1)  # In the phase in which the others wait.
  kill = world.until(Kill)
  assert kill.lost == (1,)
  assert world.time_s == pytest.approx(4 + world.patience.hang_floor_s, abs=1)


@pytest.mark.parametrize('phase', ['data', 'step'])
def test_a_loop_that_hangs_is_found_by_where_it_stands(world, phase):
  world.stuck.add(3)
  beat = world.beats[3]
  world.beats[3] = dataclasses.replace(beat, phase=phase)
  kill = world.until(Kill)
  assert kill.lost == (3,)
  assert world.time_s == pytest.approx(6 + world.patience.hang_floor_s, abs=1)


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


def test_slow_steps_are_waited_for(new_world):
  world = new_world()
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


def test_the_first_step_is_waited_for(new_world):
  world = new_world()
  world.look()
  world.stuck.update(range(4))
  world.steps(499)
  assert world.until(Kill, looks=5).lost == ()


def test_a_process_that_never_beats(new_world):
  world = new_world()
  world.look()
  del world.beats[2]

  def live():
    for slot, beat in world.beats.items():
      world.beats[slot] = dataclasses.replace(beat, alive=beat.alive + 1)

  world._live = live
  assert world.until(Kill).lost == (2,)
  assert world.time_s == pytest.approx(world.patience.slow_s + 2, abs=1)


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


def test_a_process_whose_own_devices_differ_needs_no_majority(new_world):
  world = new_world(num_slots=2, mesh='data=4', devices_per_slot=2)
  world.look()
  world.steps()
  world.fingerprint(s0='a', s1='ab')
  assert world.until(Kill).lost == (1,)


def test_two_that_differ_start_again_from_where_they_agreed(new_world):
  world = new_world(num_slots=2, mesh='data=2')
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


def test_wrong_arguments_are_not_tried_again(new_world):
  world = new_world()
  world.look()
  world.exits.update({s: exit_codes.WRONG for s in range(4)})
  assert world.until(Finish).code == exit_codes.WRONG
