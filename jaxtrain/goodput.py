"""Where the time of a run goes: goodput is the part that is steps.

The measure is that of ML Productivity Goodput (Google Cloud, 2024,
https://cloud.google.com/blog/products/ai-machine-learning/
goodput-metric-as-measure-of-ml-productivity), cited from memory: time of steps
that had not been made before, over all time since the run began, whatever
processes ran it. The categories are ours.

Time is the host's, and every moment has one category:

* `step`: steps, from the completion of the one before; `lost`: the same of
  steps that an earlier incarnation had made and did not save;
* `data`: waiting for a batch with no step on the device;
* `checkpoint`: saving, as long as steps wait for it; `evaluation`; `compile`;
* `start`: making the first state; `restart`: from the last thing that the
  incarnation before has noted until the state is restored, so the time in which
  nobody noticed, too; what runs after that has its own category;
* `other`: the rest.

An incarnation is one call of `train`; its line in `goodput.jsonl` is replaced
about once a second, so that a kill takes a second of it at most.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import json
import os
import pathlib
import time
from typing import Any

CATEGORIES = (
  'step',
  'lost',
  'data',
  'checkpoint',
  'evaluation',
  'compile',
  'start',
  'restart',
  'other',
)
# Ends after which nobody was meant to go on at once.
_FINISHED = ('steps', 'data')
_FILE = 'goodput.jsonl'


@dataclasses.dataclass(frozen=True)
class Incarnation:
  """What one process, or one call of `train`, did of a run.

  Attributes:
    start: When it started, seconds since the epoch.
    end: When it ended, or noted for the last time.
    first_step: Steps made when it took over.
    last_step: Steps made when it ended.
    lost_steps: How many of its steps had been made before.
    seconds: By category. They add up to the time from the end of the
      incarnation before (its own start, if there is none) to `end`.
    ended: 'steps' if all were made, 'data', the name of a signal or of an
      error; `None` if it runs or was killed.
  """

  start: float
  end: float
  first_step: int
  last_step: int
  lost_steps: int
  seconds: Mapping[str, float]
  ended: str | None


@dataclasses.dataclass(frozen=True)
class Record:
  """A whole run: its incarnations, oldest first."""

  incarnations: tuple[Incarnation, ...]

  @property
  def seconds(self) -> dict[str, float]:
    """By category, over all incarnations."""
    return {
      c: sum(i.seconds.get(c, 0.0) for i in self.incarnations)
      for c in CATEGORIES
    }

  @property
  def fractions(self) -> dict[str, float]:
    """The same as parts of 1; that of 'step' is the goodput."""
    return _fractions(self.seconds)


class Span:
  """One stay in a category, which may turn out to have been another."""

  def __init__(self, category: str):
    self.entered_as = self.category = category
    self.credited: dict[str, float] = {}

  def count_as(self, category: str) -> None:
    """Says what the time of this stay really was, until it ends.

    Raises:
      ValueError: An unknown category.
    """
    _check(category)
    self.category = category


class Goodput:
  """Sorts the time since it was made into `CATEGORIES`.

  Args:
    workdir: Folder of the run, for `goodput.jsonl` and what earlier
      incarnations have left in it; `None` writes nothing.
    clock: Seconds, from anywhere; only differences count.
    now: Seconds since the epoch; is asked once.
    write_every_s: Seconds between two writes while steps are made.
  """

  def __init__(
    self,
    workdir: str | os.PathLike | None = None,
    *,
    clock: Callable[[], float] = time.perf_counter,
    now: Callable[[], float] = time.time,
    write_every_s: float = 1.0,
  ):
    self._clock = clock
    self._start = self._last = self._written = clock()
    self._path = None if workdir is None else pathlib.Path(workdir) / _FILE
    self._write_every_s = write_every_s
    self._before = () if workdir is None else read(workdir).incarnations
    self._wall = now()
    self._seconds = dict.fromkeys(CATEGORIES, 0.0)
    self._open = [Span('other')]
    self._first = self._done = self._lost = 0
    self._reached = max((i.last_step for i in self._before), default=0)
    self._ended: str | None = None
    if self._before and self._before[-1].ended not in _FINISHED:
      gap = self._wall - self._before[-1].end
      # A clock that was set back must not make it negative.
      self._seconds['restart'] += max(gap, 0.0)

  @property
  def start_category(self) -> str:
    """'start' for the first incarnation of a run, else 'restart'."""
    return 'restart' if self._before else 'start'

  @contextlib.contextmanager
  def measure(self, category: str) -> Iterator[Span]:
    """Context whose time has this category; contexts inside it pause it.

    The time of 'step' is credited to 'lost' as long as steps are made that
    have been made before.

    Raises:
      ValueError: An unknown category.
    """
    _check(category)
    self._lap()
    span = Span(category)
    self._open.append(span)
    try:
      yield span
    finally:
      self._lap()
      self._open.pop()
      self._settle(span)
      self._write_if_due()

  def resumed(self, step: int) -> None:
    """Says how many steps had been made when this incarnation took over."""
    self._lap()
    self._first = self._done = step
    self._write()

  def step_done(self, step: int) -> None:
    """Says that this step, counted from 1, is complete."""
    self._lap()
    self._lost += step <= self._reached
    self._done = step
    self._write_if_due()

  def end(self, why: str) -> None:
    """Ends the incarnation; the first reason given is the one that is kept."""
    if self._ended is None:
      self._lap()
      self._ended = why
      self._write()

  def seconds(self) -> dict[str, float]:
    """By category, of this incarnation up to now, see `Incarnation`."""
    self._lap()
    return dict(self._seconds)

  def fractions(self) -> dict[str, float]:
    """Parts of the time since the run began, over all incarnations."""
    self._lap()
    return Record((*self._before, self._incarnation())).fractions

  def _lap(self):
    """Credits the time since the last call to the innermost category."""
    if self._ended is not None:
      return
    now = self._clock()
    span, elapsed = self._open[-1], now - self._last
    self._last = now
    name = self._credited_to(span.entered_as)
    self._seconds[name] += elapsed
    span.credited[name] = span.credited.get(name, 0.0) + elapsed

  def _credited_to(self, category):
    again = category == 'step' and self._done < self._reached
    return 'lost' if again else category

  def _settle(self, span):
    """Moves what a span was credited with before it was counted otherwise."""
    if span.category == span.entered_as:
      return
    name = self._credited_to(span.category)
    for old, seconds in span.credited.items():
      self._seconds[old] -= seconds
      self._seconds[name] += seconds

  def _incarnation(self):
    return Incarnation(
      start=self._wall,
      end=self._wall + self._last - self._start,
      first_step=self._first,
      last_step=self._done,
      lost_steps=self._lost,
      seconds=dict(self._seconds),
      ended=self._ended,
    )

  def _write_if_due(self):
    if self._last - self._written >= self._write_every_s:
      self._write()

  def _write(self):
    """Replaces the file at once, so that a kill leaves the old or the new."""
    self._written = self._last
    if self._path is None:
      return
    lines = [
      json.dumps(dataclasses.asdict(i)) + '\n'
      for i in (*self._before, self._incarnation())
    ]
    self._path.parent.mkdir(parents=True, exist_ok=True)
    new = self._path.with_suffix('.new')
    new.write_text(''.join(lines), encoding='utf-8')
    new.replace(self._path)


def read(workdir: str | os.PathLike) -> Record:
  """What `goodput.jsonl` of a run's folder says; no file is no incarnation."""
  path = pathlib.Path(workdir) / _FILE
  if not path.exists():
    return Record(())
  lines: list[dict[str, Any]] = [
    json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()
  ]
  return Record(tuple(Incarnation(**line) for line in lines))


def _fractions(seconds):
  total = sum(seconds.values())
  return {c: s / total if total else 0.0 for c, s in seconds.items()}


def _check(category):
  if category not in CATEGORIES:
    raise ValueError(
      f'category {category!r} is not one of {", ".join(CATEGORIES)}'
    )
