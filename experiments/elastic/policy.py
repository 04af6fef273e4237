"""Decides when trainers are started, stopped, killed, and on which mesh.

A state machine without processes: `Policy.observe` takes what can be seen and
returns what is to be done. Training goes on without the slots that failed, on
the largest mesh that is left, and grows back when they return, as elastic jobs
do (TorchElastic; Bamboo, Thorpe et al., https://arxiv.org/abs/2204.12013, and
Oobleck, Jang et al., https://arxiv.org/abs/2309.08125, both from memory, keep
spare computation or templates of pipelines instead; here every mesh is made
anew, and the state comes from a checkpoint).
"""

from collections.abc import Callable
import dataclasses

from experiments.elastic import actions
from experiments.elastic import blame
from experiments.elastic import exit_codes
from experiments.elastic.actions import Action
from experiments.elastic.actions import Observation
from experiments.elastic.vitals import Patience
from experiments.elastic.vitals import Vitals
from jaxtrain.sharding import elastic

# Exceptions that mean more than that something went wrong.
_EXIT_CODES = {
  'NonFiniteError': exit_codes.NON_FINITE,
  'ValueError': exit_codes.WRONG,
}
_WHOLE_RUN = ('steps', 'data')
_PREEMPTED = ('SIGTERM', 'SIGINT')


@dataclasses.dataclass(frozen=True)
class Limits:
  """How long to wait for what, and how often to try.

  Attributes:
    settle_s: After one process has died, for others to show why.
    stop_s: For trainers that are stopping, to save and end.
    regrow_after_s: Until a lost slot is used again, twice as long each time it
      fails; `None` never.
    max_restarts: Failures
    window_s: in so much time, after which it gives up.
    backoff_s: Before a restart; twice as long after each without progress,
    max_backoff_s: up to this.
  """

  settle_s: float = 1.0
  stop_s: float = 120.0
  regrow_after_s: float | None = 60.0
  max_restarts: int = 10
  window_s: float = 3600.0
  backoff_s: float = 0.5
  max_backoff_s: float = 60.0


class Policy:
  """Keeps a run going.

  Args:
    mesh: The whole mesh, such as 'data=4,tensor=2'.
    num_slots: Places for a process.
    devices_per_slot: Of each.
    batch_size: Rows of the global batch; stays the same on every mesh.
    accumulation: On the whole mesh, see `elastic.accumulation`.
    limits: To waiting and trying.
    patience: With trainers that give no sign.

  Raises:
    ValueError: A mesh that does not fit slots and batch.
  """

  def __init__(
    self,
    mesh: str,
    *,
    num_slots: int,
    devices_per_slot: int,
    batch_size: int,
    accumulation: int = 1,
    limits: Limits | None = None,
    patience: Patience | None = None,
  ):
    self._devices = devices_per_slot
    self._batch_size, self._accumulation = batch_size, accumulation
    self._whole = elastic.shrink_mesh(
      mesh,
      elastic.size(mesh),
      batch_size=batch_size,
      devices_per_process=devices_per_slot,
    )
    if elastic.size(mesh) > num_slots * devices_per_slot:
      raise ValueError(
        f'mesh {mesh!r} needs {elastic.size(mesh)} devices, but {num_slots} '
        f'processes of {devices_per_slot} devices have '
        f'{num_slots * devices_per_slot}'
      )
    self._num_slots = num_slots
    self._limits = limits or Limits()
    self._patience = patience or Patience()
    self._lost_at: dict[int, float] = {}
    self._losses = dict.fromkeys(range(num_slots), 0)
    self._failures: list[float] = []
    self._fruitless = 0  # Failures in a row without a new step.
    self._best_step = 0
    self._non_finite_step: int | None = None
    self._down_since: float | None = None
    self._to_idle(0.0)

  @property
  def lost(self) -> frozenset[int]:
    """Slots that failed and are not used."""
    return frozenset(self._lost_at)

  def observe(self, seen: Observation) -> list[Action]:
    """What is to be done now.

    The caller does it all before it calls again. After `Finish` nothing more
    is.
    """
    return self._state(seen)

  def describe(self) -> str:
    """Where the run stands, for a person."""
    name = self._state.__name__.removeprefix('_when_')
    lost = ', '.join(map(str, sorted(self._lost_at)))
    parts = [f'{name} at step {max(self._best_step, self._step())}']
    if self._running:
      parts.append(f'on {self._running.mesh or "one device"}')
    parts.append(f'without {lost}' if lost else 'with all processes')
    return ' '.join(parts)

  # States. Each is a method that takes an observation and returns actions.

  def _when_idle(self, seen):
    if seen.stop:
      return self._finish(exit_codes.STOPPED, 'stopped while nothing ran')
    if seen.time_s < self._start_at:
      return []
    available = self._available(seen)
    plan = self._plan(available)
    if plan is None:
      if self._may_return(seen):
        return []
      return self._finish(
        exit_codes.TOO_FEW,
        f'{len(available)} of {self._num_slots} processes are left, too few '
        f'for any mesh like {self._whole!r}, and none will come back',
      )
    for slot in plan.slots:
      self._lost_at.pop(slot, None)
    self._running = plan
    self._vitals = Vitals(plan.slots, seen.time_s, self._patience)
    self._dying_since = self._regrow_from = None
    self._recovered = False
    self._state = self._when_running
    return [plan]

  def _when_running(self, seen):
    self._vitals.update(seen.time_s, seen.beats)
    found = self._recovery(seen)
    if failure := self._failure(seen):
      return found + failure
    if seen.stop:
      return found + self._stop(seen, 'a signal')
    return found + self._grow(seen)

  def _when_stopping(self, seen):
    """Waits for the trainers to save and end, for a signal or to grow."""
    self._vitals.update(seen.time_s, seen.beats)
    self._asked_to_stop |= seen.stop
    late = seen.time_s - self._stopping_since > self._limits.stop_s
    if self._asked_to_stop:
      return self._end_stopping(seen) if late or not self._still(seen) else []
    if late:
      return self._fail(seen, 'did not stop in time', self._still(seen))
    return self._failure(seen)

  def _end_stopping(self, seen):
    ends = {b.ended for b in self._vitals.beats.values()}
    bad = sorted({code for code in seen.exits.values() if code})
    late = sorted(self._still(seen))
    if ends & set(_WHOLE_RUN) and not bad and not late:
      return self._finish(0, f'finished at step {self._step()}')
    how = f', exit codes {bad}' if bad else ''
    how += f', {_names(late)} not in time' if late else ''
    return [
      *self._kill('stopping', ()),
      *self._finish(exit_codes.STOPPED, f'stopped at step {self._step()}{how}'),
    ]

  def _when_done(self, seen):
    del seen
    return []

  # What may have gone wrong, in the order of how sure it is.

  def _failure(self, seen):
    exits = self._exits(seen)
    if failure := self._differing(seen):
      return failure
    return self._exited(seen, exits) if exits else self._hanging(seen)

  def _exits(self, seen):
    """With those that have failed, but are still busy with their end."""
    failed = {
      s: _EXIT_CODES.get(error, 1) for s, error in self._vitals.errors.items()
    }
    return {**failed, **seen.exits}

  def _differing(self, seen):
    differ, odd = self._vitals.differing()
    if not differ:
      return []
    who = _names(odd) if odd else 'nobody knows which'
    discard = actions.Discard(self._vitals.trusted_step)
    kill, *rest = self._fail(
      seen, f'copies of the parameters differ: {who}', odd
    )
    return [kill, discard, *rest]

  def _exited(self, seen, exits):
    if self._dying_since is None:
      self._dying_since = seen.time_s
    waited = seen.time_s - self._dying_since
    running = set(self._running.slots) - set(exits)
    if not any(exits.values()):
      # Those that end well wait for each other; the last may be late.
      if running and waited <= self._limits.stop_s:
        return []
      return self._ended_well(seen)
    if running and waited <= self._limits.settle_s:
      return []
    return self._died(seen, exits)

  def _ended_well(self, seen):
    ends = {s: b.ended for s, b in self._vitals.beats.items()}
    if any(why in _WHOLE_RUN for why in ends.values()) or not ends:
      return [
        *self._kill('finished', ()),
        *self._finish(0, f'finished at step {self._step()}'),
      ]
    if self._state == self._when_stopping:
      return self._restart(seen)
    taken = frozenset(s for s, why in ends.items() if why in _PREEMPTED)
    if len(taken) == len(self._running.slots):
      return self._finish(
        exit_codes.STOPPED, f'all were told to stop, at step {self._step()}'
      )
    return self._fail(seen, f'{_names(taken)} told to stop', taken)

  def _died(self, seen, exits):
    codes = {s: c for s, c in sorted(exits.items()) if c}
    blamed = blame.by_exits(codes, self._vitals.errors)
    if not blamed and exit_codes.NON_FINITE in codes.values():
      return self._non_finite(seen)
    if not blamed and exit_codes.WRONG in codes.values():
      return [
        *self._kill('wrong arguments', ()),
        *self._finish(
          exit_codes.WRONG, 'the trainer refuses its arguments, see above'
        ),
      ]
    if len(blamed) == len(self._running.slots):
      blamed = frozenset()  # All of them: not a matter of one machine.
    what = ', '.join(f'process {s}: {_exit(c)}' for s, c in codes.items())
    return self._fail(seen, what, blamed)

  def _non_finite(self, seen):
    step = self._step() + 1
    if step == self._non_finite_step:
      return [
        *self._kill('not finite', ()),
        *self._finish(
          exit_codes.POISONED,
          f'step {step} is not finite a second time: its data or the settings '
          f'are to blame; non_finite_step_{step}_*.npz has the batch',
        ),
      ]
    self._non_finite_step = step
    return self._fail(seen, f'step {step} is not finite', frozenset())

  def _hanging(self, seen):
    hung, blamed = self._vitals.hung(seen.time_s, self._still(seen))
    if not hung:
      return []
    who = _names(blamed) if blamed else 'nobody knows which'
    places = ', '.join(
      f'{s} in {b.phase} after step {b.step}'
      for s, b in sorted(self._vitals.beats.items())
    )
    return self._fail(seen, f'no sign of life: {who} ({places})', blamed)

  # Changes of state.

  def _fail(self, seen, why, blamed):
    """Kills the incarnation; the next one does without those to blame."""
    now, limits = seen.time_s, self._limits
    for slot in blamed:
      self._lost_at[slot] = now
      self._losses[slot] += 1
    self._failures = [t for t in self._failures if now - t < limits.window_s]
    self._failures.append(now)
    self._fruitless = (
      0 if self._step() > self._best_step else (self._fruitless + 1)
    )
    kill = self._kill(why, tuple(sorted(blamed)))
    if len(self._failures) > limits.max_restarts:
      return [
        *kill,
        *self._finish(
          exit_codes.GAVE_UP,
          f'{len(self._failures)} failures in {limits.window_s:.0f} s, the '
          f'last: {why}',
        ),
      ]
    wait = min(limits.backoff_s * 2**self._fruitless, limits.max_backoff_s)
    self._end_incarnation(now)
    self._to_idle(now + wait)
    return kill

  def _restart(self, seen):
    """After trainers have ended as they were asked to."""
    self._end_incarnation(self._stopping_since)
    self._to_idle(seen.time_s)
    return []

  def _end_incarnation(self, down_since):
    self._best_step = max(self._best_step, self._step())
    self._down_since = down_since

  def _to_idle(self, start_at):
    self._start_at = start_at
    self._running: actions.Start | None = None
    self._vitals: Vitals | None = None
    self._asked_to_stop = False
    self._state: Callable[[Observation], list[Action]] = self._when_idle

  def _stop(self, seen, why):
    self._stopping_since = seen.time_s
    self._asked_to_stop = seen.stop
    self._state = self._when_stopping
    return [actions.Stop(why)]

  def _kill(self, why, lost):
    return [actions.Kill(why, lost, self._step())]

  def _finish(self, code, message):
    self._state = self._when_done
    return [actions.Finish(code, message)]

  def _recovery(self, seen):
    if self._recovered or self._vitals.first_step is None:
      return []
    self._recovered = True
    first = self._vitals.first_step
    down = self._down_since
    return [
      actions.Recovered(
        first_step=first,
        lost_steps=max(self._best_step - first, 0),
        seconds=0.0 if down is None else seen.time_s - down,
      )
    ]

  # Who is there.

  def _grow(self, seen):
    """Stops at the next checkpoint if more devices could be used."""
    plan = self._plan(self._available(seen))
    larger = plan and elastic.size(plan.mesh) > elastic.size(self._running.mesh)
    if not larger or not self._vitals.has_stepped:
      self._regrow_from = None
      return []
    if self._regrow_from is None:
      self._regrow_from = (seen.saved_step,)
    if (seen.saved_step,) == self._regrow_from:
      return []
    return self._stop(seen, f'{plan.mesh} is possible again')

  def _plan(self, available):
    try:
      mesh = elastic.shrink_mesh(
        self._whole,
        len(available) * self._devices,
        batch_size=self._batch_size,
        devices_per_process=self._devices,
      )
    except ValueError:
      return None
    count = elastic.num_processes(mesh, self._devices)
    return actions.Start(
      slots=tuple(available[:count]),
      mesh=mesh,
      accumulation=elastic.accumulation(
        self._whole,
        mesh,
        batch_size=self._batch_size,
        accumulation=self._accumulation,
      ),
    )

  def _available(self, seen):
    return [
      s
      for s in range(self._num_slots)
      if s not in self._lost_at or self._has_returned(s, seen)
    ]

  def _has_returned(self, slot, seen):
    after = self._limits.regrow_after_s
    if seen.healthy is not None and slot not in seen.healthy:
      return False
    if after is None:
      return seen.healthy is not None
    wait = after * 2 ** (self._losses[slot] - 1)
    return seen.time_s - self._lost_at[slot] >= wait

  def _may_return(self, seen):
    comes_back = self._limits.regrow_after_s is not None
    return bool(self._lost_at) and (comes_back or seen.healthy is not None)

  def _still(self, seen):
    return frozenset(self._running.slots) - set(seen.exits)

  def _step(self):
    return self._vitals.step if self._vitals else 0


def _names(slots):
  return 'process ' + ', '.join(map(str, sorted(slots)))


def _exit(code):
  return f'exit code {code}' if code >= 0 else f'signal {-code}'
