"""Rows of the GPU benchmark, kept in one JSON file as they are found.

The file is written anew, and put in its place at once, after each row: whatever
stops a section, what it has found so far is there. A contender is noted before
it is tried, so that one that hangs or kills its process is known afterwards,
and is not tried again.
"""

from collections.abc import Iterator, Mapping
import contextlib
import faulthandler
import json
import os
import pathlib
import sys
import time
from typing import Any

# What `Section.run` exits with if the device can no longer be used: the section
# goes on in a new process.
DEVICE_LOST = 75
# Fields of rows that are not done: on the way, and right but not timed.
_UNFINISHED = {'started', 'checked'}
# Seconds that are left to write and to stop.
_MARGIN_S = 2.0
# What a contender is expected to need at least.
_LONGEST_START_S = 8.0


class Record:
  """The file.

  Args:
    path: Of the JSON file; it need not exist.
  """

  def __init__(self, path: pathlib.Path):
    self._path = pathlib.Path(path)

  def read(self) -> dict[str, Any]:
    """All of it: 'machine', 'peaks', 'sections'."""
    empty = dict(benchmark='gpu', machine={}, peaks={}, sections={})
    if not self._path.exists():
      return empty
    return empty | json.loads(self._path.read_text())

  def update(self, **parts: Mapping[str, Any]) -> None:
    """Adds to the mappings of those names."""
    content = self.read()
    for name, part in parts.items():
      content[name] = content[name] | part
    self._path.parent.mkdir(parents=True, exist_ok=True)
    temporary = self._path.with_suffix('.tmp')
    temporary.write_text(json.dumps(content, indent=1) + '\n')
    os.replace(temporary, self._path)

  def rows(self, section: str) -> list[dict[str, Any]]:
    """Rows of a section, in the order they were found."""
    return self.read()['sections'].get(section, {}).get('rows', [])

  def set_section(self, section: str, **fields: Any) -> None:
    """Sets fields of a section: 'status', 'seconds', 'rows'."""
    old = self.read()['sections'].get(section, {})
    self.update(sections={section: old | fields})


class Section:
  """One section, in the process that runs it.

  Args:
    record: Where rows go.
    name: Of the section.
    budget_s: Seconds from now on.
    hang_s: Seconds after which one contender is given up, with its process.
    implementation: Of the ops, that is measured as ours.
    smoke: Whether shapes are tiny.

  Attributes:
    implementation: See above, as for the next.
    smoke: Whether shapes are tiny.
  """

  def __init__(
    self,
    record: Record,
    name: str,
    *,
    budget_s: float,
    hang_s: float = 60.0,
    implementation: str = 'pallas_gpu',
    smoke: bool = False,
  ):
    self._record = record
    self._name = name
    self._deadline = time.monotonic() + budget_s
    self._start_s = min(_LONGEST_START_S, 0.1 * budget_s)
    self._hang_s = hang_s
    self.implementation = implementation
    self.smoke = smoke
    self._give_up_on_unfinished()

  @property
  def left_s(self) -> float:
    """Seconds that are left for work."""
    return self._deadline - time.monotonic() - _MARGIN_S

  @property
  def can_start(self) -> bool:
    """Whether there is time to compile something, and to check it."""
    return self.left_s > self._start_s

  def rows(self) -> list[dict[str, Any]]:
    """All that is known."""
    return self._record.rows(self._name)

  def has(self, row: str, contender: str) -> bool:
    """Whether this is done, here or in an earlier process."""
    known = self.find(row, contender)
    return known is not None and not known.keys() & _UNFINISHED

  def find(self, row: str, contender: str) -> dict[str, Any] | None:
    """What is known of it."""
    for known in self._record.rows(self._name):
      if (known['row'], known['contender']) == (row, contender):
        return known
    return None

  def add(self, row: str, contender: str, **fields: Any) -> None:
    """Notes what was found, in place of what was noted before, and prints it.

    Args:
      row: What was done.
      contender: By whom.
      **fields: 'us' and figures; or 'skipped', why there are none; or 'error',
        what went wrong, with `wrong=True` if it counts as a failed check.
    """
    rows = self._record.rows(self._name)
    same = lambda r: (r['row'], r['contender']) == (row, contender)
    found = dict(row=row, contender=contender) | fields
    rows = [r for r in rows if not same(r)] + [found]
    self._record.set_section(self._name, rows=rows)
    if not fields.keys() & _UNFINISHED:
      print(json.dumps(dict(section=self._name) | found), flush=True)

  def peaks(self) -> dict[str, float]:
    """What the section of that name has measured."""
    return self._record.read()['peaks']

  def set_peaks(self, **peaks: float) -> None:
    """Keeps them for the other sections."""
    self._record.update(peaks=peaks)

  @contextlib.contextmanager
  def trying(
    self,
    row: str,
    contender: str,
    *,
    is_ours: bool,
    hang_s: float | None = None,
  ) -> Iterator[None]:
    """Turns what one contender raises into a row; ends a process that hangs.

    Args:
      row: As in `add`.
      contender: As in `add`.
      is_ours: Whether its failure is that of the benchmark.
      hang_s: In place of that of the section.

    Raises:
      SystemExit: With `DEVICE_LOST`, if the device no longer computes.
    """
    self.add(row, contender, started=True, wrong=is_ours)
    faulthandler.dump_traceback_later(
      hang_s or self._hang_s, exit=True, file=sys.__stderr__
    )
    try:
      yield
      if 'started' in self.find(row, contender):
        self.add(row, contender, checked=True)
    except NotImplementedError as e:
      self.add(row, contender, skipped=_short(e))
    except Exception as e:
      kind = type(e).__name__
      self.add(row, contender, error=f'{kind}: {_short(e)}', wrong=is_ours)
      if not _device_works():
        raise SystemExit(DEVICE_LOST) from e
    finally:
      faulthandler.cancel_dump_traceback_later()

  def _give_up_on_unfinished(self):
    for row in self._record.rows(self._name):
      if row.get('started'):
        self.add(
          row['row'],
          row['contender'],
          error='did not end: it hung, or killed its process',
          wrong=row['wrong'],
        )


def _short(error):
  lines = str(error).strip().splitlines() or ['']
  return ' '.join(lines[:3])[:300]


def _device_works():
  import jax
  import jax.numpy as jnp

  try:
    return float(jax.block_until_ready(jnp.ones(4) + 1).sum()) == 8
  except Exception:
    return False
