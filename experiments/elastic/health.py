"""Asks lost machines whether they are well again, without waiting for them."""

from collections.abc import Set
import subprocess
import time


class Health:
  """Runs a command for each lost slot, over and over.

  Args:
    command: Shell command in which '{slot}' is the slot's number; exit code 0
      means it can be used. `None` asks nobody.
    every_s: Seconds between two questions to one slot.
    timeout_s: After which no answer is no.
  """

  def __init__(
    self, command: str | None, every_s: float = 5.0, timeout_s: float = 30.0
  ):
    self._command = command
    self._every_s, self._timeout_s = every_s, timeout_s
    self._asked: dict[int, tuple[float, subprocess.Popen]] = {}
    self._well: set[int] = set()

  def ask(self, lost: Set[int]) -> frozenset[int] | None:
    """The lost slots whose last answer was yes; `None` without a command."""
    if self._command is None:
      return None
    now = time.monotonic()
    for slot in set(self._asked) - lost:
      self._forget(slot)
    for slot in lost:
      if slot not in self._asked:
        self._start(slot, now)
        continue
      since, process = self._asked[slot]
      code = process.poll()
      if code is None and now - since > self._timeout_s:
        process.kill()
        code = process.wait()
      if code is not None:
        (self._well.discard if code else self._well.add)(slot)
        if now - since > self._every_s:
          self._start(slot, now)
    return frozenset(self._well)

  def close(self) -> None:
    """Ends what still runs."""
    for slot in list(self._asked):
      self._forget(slot)

  def _start(self, slot, now):
    # The number, not a format: shell commands are full of braces.
    command = self._command.replace('{slot}', str(slot))
    self._asked[slot] = (
      now,
      subprocess.Popen(
        command,
        shell=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
      ),
    )

  def _forget(self, slot):
    _, process = self._asked.pop(slot)
    self._well.discard(slot)
    if process.poll() is None:
      process.kill()
      process.wait()
