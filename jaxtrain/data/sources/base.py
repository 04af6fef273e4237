"""What a source of documents is, and what sources share.

A source is a function `(*, split='train', **kwargs) -> Sequence[str]`: a random
access sequence of non-empty documents, the same ones in the same order in every
process and every run. It reads what it needs to know their number at once, and
may read a document each time that it is asked for.

Held-out documents are chosen by a hash of their bytes, so adding files moves
none from one split to the other, and of two equal documents both or neither are
held out.
"""

from collections.abc import Callable, Sequence
import dataclasses
import glob
import hashlib
import os
import pathlib
from typing import Protocol

import numpy as np

SPLITS = ('train', 'validation')


class Source(Protocol):
  """Makes the documents of one split."""

  def __call__(self, *, split: str = 'train', **kwargs) -> Sequence[str]: ...


@dataclasses.dataclass(frozen=True)
class FileDocuments(Sequence[str]):
  """Documents that are byte ranges of files, read when asked for.

  Attributes:
    paths: The files.
    spans: `[N, 3]` int64: for each document its file, first byte and end.
    parse: Text of a document's bytes.
  """

  paths: tuple[pathlib.Path, ...]
  spans: np.ndarray
  parse: Callable[[bytes], str]

  def __len__(self) -> int:
    return len(self.spans)

  def __getitem__(self, index: int) -> str:
    file, start, stop = self.spans[index].tolist()
    with self.paths[file].open('rb') as f:
      f.seek(start)
      return self.parse(f.read(stop - start))


def check_split(split: str, validation_fraction: float) -> None:
  """Checks the arguments every source has.

  Raises:
    ValueError: An unknown split, a fraction outside [0, 1), or the validation
      split of nothing.
  """
  if split not in SPLITS:
    raise ValueError(f'split {split!r} is not one of {", ".join(SPLITS)}')
  if not 0 <= validation_fraction < 1:
    raise ValueError(
      f'validation_fraction={validation_fraction} is not in [0, 1)'
    )
  if split == 'validation' and not validation_fraction:
    raise ValueError(
      'validation_fraction=0 holds out nothing for split="validation"; give a '
      'fraction, or other files as a source of their own'
    )


def in_split(document: bytes, split: str, validation_fraction: float) -> bool:
  """Whether a document belongs to `split`."""
  digest = hashlib.sha256(document).digest()
  held_out = int.from_bytes(digest[:8], 'big') < validation_fraction * 2**64
  return held_out == (split == 'validation')


def check_found(num_documents: int, where: str, split: str) -> None:
  """Raises ValueError if a source found no document in its split."""
  if not num_documents:
    raise ValueError(
      f'no document in split {split!r} of {where}: they are empty, too few for '
      'the fraction held out, or not there'
    )


def find_files(files: str | os.PathLike | Sequence[str | os.PathLike]):
  """Expands paths and globs ('data/**/*.txt'), in order, without repeats.

  Raises:
    ValueError: A file that is not there, a glob that matches no file, or no
      argument at all.
  """
  if isinstance(files, str | os.PathLike):
    files = [files]
  found = []
  for item in map(os.fspath, files):
    # An existing path is itself, whatever characters are in its name.
    if os.path.isfile(item):
      found.append(item)
    elif os.path.isdir(item):
      raise ValueError(
        f'{item!r} is a directory; give a glob such as '
        f'{os.path.join(item, "**", "*")!r}'
      )
    elif not glob.has_magic(item):
      raise ValueError(f'no file {item!r}')
    else:
      matches = sorted(filter(os.path.isfile, glob.glob(item, recursive=True)))
      if not matches:
        raise ValueError(f'no file matches {item!r}')
      found.extend(matches)
  if not found:
    raise ValueError('files is empty; give paths or globs')
  return tuple(pathlib.Path(p) for p in dict.fromkeys(found))
