"""One run at a time saves into a folder.

Two would replace and delete each other's checkpoints. The run that saves holds
`saver.lock`, which says who it is. On one machine the kernel's lock on that
file (flock) decides: it ends with its process, however that ends. Between
machines, whose file systems may not share such locks, the owner touches the
file every few seconds, and another run takes over once it has watched it
untouched for long enough; no clocks are compared. Reading needs no lock. A
process that the owner has forked, and that outlives it, keeps the lock.

Buckets have neither locks nor times that can be touched: there nothing is
checked.
"""

import datetime
import fcntl
import json
import logging
import os
import pathlib
import socket
import threading
import time

_NAME = 'saver.lock'
_BOOT = pathlib.Path('/proc/sys/kernel/random/boot_id')

_log = logging.getLogger(__name__)


class SaverLock:
  """The right to save into a folder.

  Args:
    directory: The folder; it is there when `acquire` is called.
    beat_s: How often the owner touches the file.
    stale_s: For how long nobody must have touched it to take it over.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    beat_s: float = 5.0,
    stale_s: float = 30.0,
  ):
    self._directory = os.fspath(directory)
    self._path = pathlib.Path(self._directory) / _NAME
    self._beat_s, self._stale_s = beat_s, stale_s
    self._fd: int | None = None
    self._thread: threading.Thread | None = None
    self._stop = threading.Event()

  def acquire(self) -> None:
    """Takes the lock, or that of an owner who is dead.

    Waits, up to `stale_s`, for a sign of life from an owner on another machine.

    Raises:
      ValueError: Names the run that has it.
    """
    if self._fd is not None or '://' in self._directory:
      return
    fd, is_locked = self._open()
    try:
      owner = _read(fd)
      if owner and self._is_alive(owner, is_locked):
        raise ValueError(self._refusal(owner))
      if owner:
        _log.warning(
          'Taking over %s from %s, which is dead', self._path, _who(owner)
        )
      os.ftruncate(fd, 0)
      os.pwrite(fd, json.dumps(_self()).encode(), 0)
    except BaseException:
      os.close(fd)
      raise
    self._fd = fd
    self._thread = threading.Thread(
      target=self._beat, name='saver_lock', daemon=True, args=(fd,)
    )
    self._thread.start()

  def release(self) -> None:
    """Gives the lock back, if it was taken."""
    if self._fd is None:
      return
    self._stop.set()
    self._thread.join()  # It must not touch the next file of this number.
    if self._is_ours(self._fd):
      self._path.unlink()
    os.close(self._fd)
    self._fd = None

  def _open(self):
    """The open file, and whether the kernel's lock on it is ours."""
    while True:
      fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
      try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_locked = True
      except BlockingIOError as e:
        owner = _read(fd)
        os.close(fd)
        raise ValueError(self._refusal(owner)) from e
      except OSError:  # No such locks on this file system.
        is_locked = False
      if self._is_ours(fd):
        return fd, is_locked
      os.close(fd)  # Its owner gave it back in between.

  def _is_ours(self, fd):
    try:
      return os.path.samestat(os.fstat(fd), os.stat(self._path))
    except (FileNotFoundError, NotADirectoryError):  # The folder is gone.
      return False

  def _is_alive(self, owner, is_locked):
    """Whether the run that wrote the file still runs."""
    if owner.get('boot') == _boot():
      # The same kernel: it would not have given us the lock.
      return not is_locked and _started(owner['pid']) == owner['ticks']
    before = os.stat(self._path).st_mtime_ns
    _log.warning(
      'Waiting %.0f s for a sign of life from %s', self._stale_s, _who(owner)
    )
    end = time.monotonic() + self._stale_s
    while time.monotonic() < end:
      time.sleep(min(self._beat_s / 2, self._stale_s / 4))
      if os.stat(self._path).st_mtime_ns != before:
        return True
    return False

  def _beat(self, fd):
    while not self._stop.wait(self._beat_s):
      try:
        os.utime(fd)
      except OSError:  # Given back, or the folder is gone.
        return

  def _refusal(self, owner):
    return (
      f'{self._directory} is saved into by {_who(owner)}; two runs would '
      "delete each other's checkpoints: stop that one, or use another folder"
    )


def _self():
  return {
    'host': socket.gethostname(),
    'pid': os.getpid(),
    'since': datetime.datetime.now().isoformat(timespec='seconds'),
    'boot': _boot(),
    'ticks': _started(os.getpid()),
  }


def _who(owner):
  if not owner:
    return 'another run'
  return f'process {owner["pid"]} on {owner["host"]} (since {owner["since"]})'


def _read(fd):
  """What the owner wrote, `None` if it had not come to that."""
  try:
    owner = json.loads(os.pread(fd, 1 << 12, 0))
    return owner if {'host', 'pid', 'since', 'ticks'} <= set(owner) else None
  except (ValueError, TypeError):
    return None


def _boot():
  """What tells machines, and their starts, apart."""
  return _BOOT.read_text().strip() if _BOOT.exists() else socket.gethostname()


def _started(pid):
  """When a process started, `None` if there is none; pids are used again."""
  try:
    stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except OSError:
    return None
  return int(stat.rpartition(')')[2].split()[19])
