"""Is there room for a checkpoint, and did the disk fill up?"""

import errno
import os
import pathlib
from typing import Any

import jax

_FULL = (errno.ENOSPC, errno.EDQUOT)
_WORDS = ('No space left on device', 'Disk quota exceeded')
_UNITS = ('bytes', 'kB', 'MB', 'GB', 'TB')
# Metadata, indices and lists.
_EXTRA_BYTES = 1 << 20


class SaveError(OSError):
  """A checkpoint could not be written; nothing is left of it."""


class NoSpaceError(SaveError):
  """There is no room for a checkpoint, or there was too little."""


def needed_bytes(state: Any) -> int:
  """Bytes a state takes in the folder that all processes share, at most.

  Replicas are written once. Compression makes it less, of noise by a tenth.
  """
  leaves = jax.tree.leaves(state)
  return sum(getattr(x, 'nbytes', 8) for x in leaves) + _EXTRA_BYTES


def shortage(directory: str | os.PathLike, needed: int) -> str:
  """What to say if `directory` has no room for `needed` bytes, '' if it has.

  Buckets always have.
  """
  if '://' in os.fspath(directory):
    return ''
  path = pathlib.Path(directory)
  while not path.exists():
    path = path.parent
  try:
    found = os.statvfs(path)
  except OSError:  # Better to try than to refuse.
    return ''
  free = found.f_bavail * found.f_frsize
  if free >= needed:
    return ''
  return (
    f'{directory} has {_words(free)} free and the checkpoint may take '
    f'{_words(needed)}; free some, keep fewer checkpoints, or save elsewhere'
  )


def is_full(error: BaseException | None) -> bool:
  """Whether an error says that a disk is full, or one that caused it does."""
  while error is not None:
    if isinstance(error, OSError) and error.errno in _FULL:
      return True
    if any(words in str(error) for words in _WORDS):
      return True
    error = error.__cause__ or error.__context__
  return False


def _words(num_bytes):
  power = max(0, len(str(num_bytes)) - 1) // 3
  power = min(power, len(_UNITS) - 1)
  return f'{num_bytes / 1000**power:.3g} {_UNITS[power]}'
