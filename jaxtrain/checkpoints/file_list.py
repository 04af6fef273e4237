"""A list of a checkpoint's files, to notice at once that one was damaged.

Written into the folder just before it gets its final name. Without it a missing
or truncated file is found by whatever reads it, in words of its own. Sizes are
compared, not contents: that costs nothing, and finds interrupted copies and
deletions, but no flipped bits.
"""

import json
import os
import pathlib

_NAME = 'files.json'


def write(folder: pathlib.Path) -> None:
  """Writes the names and sizes of all files in the folders of `folder`."""
  (folder / _NAME).write_text(json.dumps(_sizes(folder), indent=0))


def check(folder: pathlib.Path) -> None:
  """Compares the files in the folders of `folder` to its list, if it has one.

  Raises:
    ValueError: The list is unreadable, or a file is missing or of another
      size.
  """
  if not (folder / _NAME).exists():
    return
  listed = json.loads((folder / _NAME).read_text())
  found = _sizes(folder)
  for name, size in listed.items():
    if name not in found:
      raise ValueError(f'{name} is missing')
    if found[name] != size:
      raise ValueError(f'{name} has {found[name]} bytes instead of {size}')


def _sizes(folder):
  sizes = {}
  for parent, _, names in os.walk(folder):
    if parent == os.fspath(folder):
      continue  # Orbax still writes there.
    for name in names:
      path = os.path.join(parent, name)
      sizes[os.path.relpath(path, folder)] = os.path.getsize(path)
  return sizes
