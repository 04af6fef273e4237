"""Processes of the supervisor: started, heard, and never left behind."""

from collections.abc import Callable, Sequence
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

_DIE_WITH_PARENT = pathlib.Path(__file__).with_name('die_with_parent.py')


class Child:
  """A process in a group of its own, which ends when this one does.

  Args:
    name: Stands before each line of its output.
    command: Program and arguments.
    say: Called with each line, from a thread.
  """

  def __init__(
    self,
    name: str,
    command: Sequence[str],
    say: Callable[[str], None],
  ):
    self._process = subprocess.Popen(
      # -I -S: nothing is imported that the program itself would not.
      [
        *(sys.executable, '-I', '-S', str(_DIE_WITH_PARENT)),
        *(str(os.getpid()), *command),
      ],
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      errors='replace',
      start_new_session=True,
    )
    self._reader = threading.Thread(
      target=self._relay, args=(name, say), daemon=True
    )
    self._reader.start()

  @property
  def pid(self) -> int:
    """Of the process, and of its group."""
    return self._process.pid

  def exit_code(self) -> int | None:
    """Negative for a signal; `None` if it runs."""
    return self._process.poll()

  def terminate(self) -> None:
    """Asks it to end."""
    if self.exit_code() is None:
      self._process.terminate()

  def send_kill(self) -> None:
    """Sends SIGKILL to it and what it has started, stopped or not."""
    try:
      os.killpg(self.pid, signal.SIGKILL)
    except ProcessLookupError:
      pass

  def kill(self) -> None:
    """Ends it and what it has started."""
    self.send_kill()
    self._process.wait()
    self._reader.join(timeout=5)

  def _relay(self, name, say):
    with self._process.stdout as lines:
      for line in lines:
        say(f'[{name}] {line.rstrip()}')


def free_port() -> int:
  """A port of the loopback on which nobody listens."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]
