"""Checkpoints disappear at once, or not at all.

Orbax deletes file by file under the checkpoint's name, so that a process killed
meanwhile leaves a checkpoint with holes. Here it is renamed first, to a name
that `is_leftover` knows.
"""

import pathlib
import shutil

import jax

from jaxtrain.checkpoints import file_list

_DELETED = '.deleted'
_DAMAGED = '.damaged'


class Deleter:
  """Stands in for the deleter of orbax's manager. Call from every process.

  Args:
    directory: Of the checkpoints.
    name: Name of the folder of a step.
  """

  def __init__(self, directory, name):
    self._directory, self._name = directory, name

  def delete(self, step: int) -> None:
    """Deletes the checkpoint of a step, if it is there."""
    if jax.process_index() > 0:
      return
    folder = self._directory / self._name(step)
    if '://' in str(folder):  # Buckets cannot rename.
      folder.rmtree(missing_ok=True)
      return
    # The newer one must be on the disk before the older is not.
    make_durable(self._directory)
    try:
      aside = move_aside(folder, _DELETED)
    except FileNotFoundError:
      return
    shutil.rmtree(aside, ignore_errors=True)

  def delete_steps(self, steps: list[int]) -> None:
    """Deletes the checkpoints of some steps."""
    for step in steps:
      self.delete(step)

  def close(self) -> None:
    """Does nothing."""


def is_leftover(name: str) -> bool:
  """Whether a folder of this name was being deleted."""
  return _DELETED in name


def set_aside(folder) -> pathlib.Path:
  """Renames a damaged checkpoint, which then counts no more; the new name."""
  return move_aside(folder, _DAMAGED)


def move_aside(folder, ending: str) -> pathlib.Path:
  """Renames a folder to the first free name with an ending; the new name.

  Raises:
    FileNotFoundError: There is no such folder.
  """
  folder = pathlib.Path(folder)
  number = 1
  while True:
    more = '' if number == 1 else f'-{number}'
    new = folder.with_name(f'{folder.name}{ending}{more}')
    if not new.exists():
      folder.rename(new)
      return new
    number += 1


def make_durable(directory) -> None:
  """Has the names in a folder of checkpoints written to the disk."""
  if '://' in str(directory):
    return
  directory = pathlib.Path(directory)
  newest = max(
    (p for p in directory.iterdir() if p.name.isdigit()),
    key=lambda p: p.stat().st_mtime,
    default=None,
  )
  if newest is not None:
    files = [p.name for p in newest.iterdir() if p.is_file()]
    file_list.sync(newest, files)
  file_list.sync(directory)
