"""The running Python's standard library: real text on every machine.

Its source files, with their docstrings, and the reference manual's topics that
`help()` prints. About 30 MB with the library's own tests, 13 MB without; some
distributions leave the tests out.
"""

import ast
from collections.abc import Sequence
import os
import pathlib
import sysconfig

from jaxtrain.data.sources import base

_SKIP_FOLDERS = {'site-packages', 'dist-packages', '__pycache__'}
_TOPICS = 'pydoc_data/topics.py'


def stdlib(
  *,
  split: str = 'train',
  validation_fraction: float = 0.05,
  include_tests: bool = True,
) -> Sequence[str]:
  """Documents of the standard library, held in memory.

  Args:
    split: 'train' or 'validation'.
    validation_fraction: Share of the files held out of training.
    include_tests: Whether the library's own tests belong to it.

  Returns:
    Files in the order of their paths, then the manual's topics in that of
    their names. Empty files and those that are not UTF-8 are left out, and so
    are files that describe the machine Python was built on.

  Raises:
    ValueError: An unknown split, a fraction outside [0, 1), or a Python whose
      library is not in a folder (zipped or frozen).
  """
  base.check_split(split, validation_fraction)
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  documents = []
  for path in _files(root, include_tests):
    data = path.read_bytes()
    texts = _topics(data) if path == root / _TOPICS else [data]
    documents += [
      t for t in texts if t and base.in_split(t, split, validation_fraction)
    ]
  documents = [d for d in map(_decode, documents) if d is not None]
  base.check_found(len(documents), f'the standard library in {root}', split)
  return documents


def _files(root: pathlib.Path, include_tests: bool) -> list[pathlib.Path]:
  found = []
  for folder, subfolders, names in os.walk(root):
    skip = _SKIP_FOLDERS | (set() if include_tests else {'test', 'tests'})
    subfolders[:] = [
      s for s in subfolders if s not in skip and not s.startswith('config-')
    ]
    found += [
      pathlib.Path(folder, n)
      for n in names
      if n.endswith('.py') and not n.startswith('_sysconfigdata')
    ]
  # Topics come last, whatever else is in the library.
  order = lambda p: (p == root / _TOPICS, p.relative_to(root).parts)
  return sorted(found, key=order)


def _topics(data: bytes) -> list[bytes]:
  """The values of `topics = {name: text}`, whatever surrounds it."""
  for node in ast.parse(data).body:
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
      topics = ast.literal_eval(node.value)
      return [topics[name].encode() for name in sorted(topics)]
  return []


def _decode(data: bytes) -> str | None:
  try:
    return data.decode()
  except UnicodeDecodeError:
    return None
