"""Signs of life of a training process: a small file that it keeps rewriting.

Two things are told apart. The *loop* beats when a step is complete or it goes
over to something else; a thread of its own says that the *process* is alive,
because when one process of several hangs, all loops stop in the same
collective, and only the thread of the hanging one stops too.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import json
import os
import pathlib
import threading
import time
from typing import Any

# Of the multiples of each, the newest few fingerprints are kept: processes that
# are read at slightly different times still have some in common.
_KEPT_EVERY = (1, 8, 64, 512)
_KEPT = 4
_WRITE_EVERY_S = 0.02  # At most, from the loop: a write takes 0.1 ms.


@dataclasses.dataclass(frozen=True)
class Beat:
  """What a heartbeat file says.

  Attributes:
    pid: Process.
    alive: Grows as long as the process is not stopped.
    loop: Grows with every step and change of phase.
    step: Steps that are complete.
    phase: 'start', 'compile', 'evaluation', 'checkpoint', 'data', 'step', or
      'device' in those parts of a step that wait for devices, and so for other
      processes.
    first_step: Steps that had been made when the process took over.
    fingerprints: Step -> group of devices that hold the same -> checksum of
      what each of them holds, see `fingerprint.py`. The newest steps only.
    ended: Why the loop has ended: 'steps', 'data' or the name of a signal.
    error: Name of the exception that ended it.
  """

  pid: int = 0
  alive: int = 0
  loop: int = 0
  step: int = 0
  phase: str = 'start'
  first_step: int = 0
  fingerprints: Mapping[int, Mapping[str, tuple[int, ...]]] = dataclasses.field(
    default_factory=dict
  )
  ended: str | None = None
  error: str | None = None


class Heartbeat:
  """Writes a `Beat` again and again, from the loop and from a thread.

  Args:
    path: File, replaced each time; its folder is made.
    every_s: Seconds between the thread's beats.
    fingerprint_every: Steps between fingerprints of the parameters; `None`
      takes none.

  Raises:
    ValueError: `fingerprint_every` below 1.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    *,
    every_s: float = 0.25,
    fingerprint_every: int | None = 1,
  ):
    if fingerprint_every is not None and fingerprint_every < 1:
      raise ValueError(
        f'fingerprint_every={fingerprint_every} must be at least 1'
      )
    self.fingerprint_every = fingerprint_every
    self._path = pathlib.Path(path)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._every_s = every_s
    self._lock = threading.Lock()
    self._beat = Beat(pid=os.getpid())
    self._written = 0.0
    self._stop = threading.Event()
    self._thread = threading.Thread(
      target=self._stay_alive, name='heartbeat', daemon=True
    )
    self._change(now=True)
    self._thread.start()

  def resumed(self, step: int) -> None:
    """Says how many steps have been made."""
    self._change(step=step, first_step=step)

  def step_done(self, step: int) -> None:
    """Says that this step, counted from 1, is complete."""
    self._change(step=step)

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Context in which the loop does something else than before."""
    before = self._beat.phase
    self._change(phase=name)
    try:
      yield
    finally:
      self._change(phase=before)

  def fingerprint(
    self, step: int, checksums: Mapping[str, tuple[int, ...]]
  ) -> None:
    """Notes checksums of the state after a step, by group of devices."""
    known = {**self._beat.fingerprints, step: dict(checksums)}
    kept = set()
    for every in _KEPT_EVERY:
      kept.update(sorted(s for s in known if s % every == 0)[-_KEPT:])
    self._change(fingerprints={s: known[s] for s in sorted(kept)})

  def end(self, why: str) -> None:
    """Says why the loop has ended."""
    self._change(now=True, ended=why)

  def close(self) -> None:
    """Stops the thread; the file stays."""
    self._stop.set()
    self._thread.join()

  def __enter__(self) -> 'Heartbeat':
    return self

  def __exit__(self, *error) -> None:
    if error[0] is not None:
      self._change(now=True, error=error[0].__name__)
    self.close()

  def _stay_alive(self):
    while not self._stop.wait(self._every_s):
      with self._lock:
        self._beat = dataclasses.replace(self._beat, alive=self._beat.alive + 1)
        self._write()

  def _change(self, now=False, **values):
    with self._lock:
      self._beat = dataclasses.replace(
        self._beat, loop=self._beat.loop + 1, **values
      )
      # The thread writes what is left out here.
      if now or time.monotonic() - self._written >= _WRITE_EVERY_S:
        self._write()

  def _write(self):
    self._written = time.monotonic()
    new = self._path.with_suffix('.new')
    new.write_text(json.dumps(dataclasses.asdict(self._beat)))
    new.replace(self._path)


def read(path: str | os.PathLike) -> Beat | None:
  """The last beat written to a file, or `None` if there is none."""
  try:
    values: dict[str, Any] = json.loads(pathlib.Path(path).read_text())
  except FileNotFoundError:
    return None
  values['fingerprints'] = {
    int(step): {group: tuple(sums) for group, sums in groups.items()}
    for step, groups in values['fingerprints'].items()
  }
  return Beat(**values)
