"""What the heartbeats of one incarnation have shown so far, and since when."""

import collections
from collections.abc import Mapping
import dataclasses
import statistics

from experiments.elastic import blame
from jaxtrain.heartbeat import Beat

# What may take much longer than a step, and does not tell beforehand.
_SLOW_PHASES = ('start', 'compile', 'evaluation', 'checkpoint')


@dataclasses.dataclass(frozen=True)
class Patience:
  """For how long nothing may happen.

  Attributes:
    hang_floor_s: At least so long between two signs of a loop,
    hang_factor: and so many times the median step.
    slow_s: The same before the first step, and in an evaluation or a save.
    alive_s: Between two signs of a process, whatever its loop does.
  """

  hang_floor_s: float = 60.0
  hang_factor: float = 10.0
  slow_s: float = 900.0
  alive_s: float = 30.0


class Vitals:
  """Follows the processes of one incarnation.

  Args:
    slots: Where they run.
    time_s: When they were started.
    patience: With them.
  """

  def __init__(self, slots: tuple[int, ...], time_s: float, patience: Patience):
    self._slots = slots
    self._patience = patience
    self._beats: dict[int, Beat] = {}
    self._alive_at = dict.fromkeys(slots, time_s)
    self._loop_at = dict.fromkeys(slots, time_s)
    self._durations: collections.deque[float] = collections.deque(maxlen=31)
    self._stepped: tuple[float, int] | None = None
    self._agreed_step = 0

  @property
  def beats(self) -> Mapping[int, Beat]:
    """The newest of each slot that has any."""
    return self._beats

  @property
  def errors(self) -> dict[int, str]:
    """Names of the exceptions that have ended loops."""
    return {s: b.error for s, b in self._beats.items() if b.error is not None}

  @property
  def first_step(self) -> int | None:
    """Steps made when it took over, if it has."""
    if len(self._beats) < len(self._slots) or not self.has_stepped:
      return None
    return max(b.first_step for b in self._beats.values())

  @property
  def has_stepped(self) -> bool:
    """Whether a step is complete, in all processes."""
    return len(self._beats) == len(self._slots) and all(
      b.step > b.first_step for b in self._beats.values()
    )

  @property
  def step(self) -> int:
    """The newest step that any process knows to be complete."""
    return max((b.step for b in self._beats.values()), default=0)

  @property
  def trusted_step(self) -> int:
    """The newest step at which all copies of the parameters were the same."""
    starts = [b.first_step for b in self._beats.values()]
    return max([self._agreed_step, *starts])

  def update(self, time_s: float, beats: Mapping[int, Beat]) -> None:
    """Takes note of what has changed."""
    for slot, beat in beats.items():
      if slot not in self._alive_at:
        continue
      before = self._beats.get(slot)
      if before is None or beat.loop != before.loop:
        self._loop_at[slot] = self._alive_at[slot] = time_s
      elif beat.alive != before.alive:
        self._alive_at[slot] = time_s
      self._beats[slot] = beat
    self._time_steps(time_s)

  def hung(
    self, time_s: float, running: set[int]
  ) -> tuple[bool, frozenset[int]]:
    """Whether nothing has happened for too long, and who is to blame.

    Args:
      time_s: Now.
      running: Slots whose processes have not ended.
    """
    silent = frozenset(
      s for s in running if time_s - self._alive_at[s] > self._alive_limit(s)
    )
    if silent:
      return True, silent if len(silent) < len(self._slots) else frozenset()
    if not running or not all(s in self._beats for s in running):
      return False, frozenset()
    limit = self._loop_limit(running)
    if all(time_s - self._loop_at[s] <= limit for s in running):
      return False, frozenset()
    # One that is stopped may not have come to say where it stands.
    quiet = frozenset(
      s for s in running if time_s - self._alive_at[s] > limit / 2
    )
    if 0 < len(quiet) < len(running):
      return True, quiet
    return True, blame.by_beats({s: self._beats[s] for s in running})

  def differing(self) -> tuple[bool, frozenset[int]]:
    """Whether copies of the parameters differ, and who is to blame.

    Compares the steps that all have reported, up to the first that differs.
    """
    if len(self._beats) < len(self._slots):
      return False, frozenset()
    prints = {s: b.fingerprints for s, b in self._beats.items()}
    for step in sorted(set.intersection(*(set(p) for p in prints.values()))):
      differ, odd = blame.by_fingerprints(
        {s: p[step] for s, p in prints.items()}
      )
      if differ:
        return True, odd
      self._agreed_step = max(self._agreed_step, step)
    return False, frozenset()

  def _alive_limit(self, slot):
    # Before its first beat a process imports its modules.
    known = slot in self._beats
    return self._patience.alive_s if known else self._patience.slow_s

  def _loop_limit(self, running):
    slow = any(self._beats[s].phase in _SLOW_PHASES for s in running)
    if slow or not self.has_stepped or not self._durations:
      return self._patience.slow_s
    median = statistics.median(self._durations)
    return max(self._patience.hang_floor_s, self._patience.hang_factor * median)

  def _time_steps(self, time_s):
    """Notes how long the steps took that are complete since the last time."""
    if not self.has_stepped:
      return
    step = min(b.step for b in self._beats.values())
    if self._stepped is not None and step > self._stepped[1]:
      since, before = self._stepped
      self._durations.append((time_s - since) / (step - before))
    if self._stepped is None or step > self._stepped[1]:
      self._stepped = (time_s, step)
