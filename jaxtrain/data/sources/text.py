"""Plain text files: a document is a file, or what stands between separators."""

from collections.abc import Iterator, Sequence
import os
import pathlib

import numpy as np
import tqdm

from jaxtrain.data.sources import base


def text(
  files: str | os.PathLike | Sequence[str | os.PathLike],
  *,
  split: str = 'train',
  validation_fraction: float = 0.0,
  separator: str | None = None,
) -> Sequence[str]:
  """Documents of UTF-8 text files.

  Args:
    files: Paths or globs.
    split: 'train' or 'validation'.
    validation_fraction: Share of the documents held out of training.
    separator: Text that ends a document, itself left out, for instance
      '<|endoftext|>'. `None`: a file is one document.

  Returns:
    The documents, read when asked for. Empty ones are left out.

  Raises:
    ValueError: A missing file, a glob without matches, a file that is not
      UTF-8, an empty separator, or no document in the split.
  """
  base.check_split(split, validation_fraction)
  if separator == '':
    raise ValueError('separator is empty; give None for one document a file')
  paths = base.find_files(files)
  spans = []
  for i, path in enumerate(tqdm.tqdm(paths, 'reading text', delay=2)):
    data = path.read_bytes()
    _check_utf8(path, data)
    for start, stop in _pieces(data, separator):
      if base.in_split(data[start:stop], split, validation_fraction):
        spans.append((i, start, stop))
  base.check_found(len(spans), f'{len(paths)} text files', split)
  return base.FileDocuments(paths, np.array(spans, np.int64), bytes.decode)


def _pieces(data: bytes, separator: str | None) -> Iterator[tuple[int, int]]:
  mark = None if separator is None else separator.encode()
  start = 0
  while start < len(data):
    stop = -1 if mark is None else data.find(mark, start)
    stop = len(data) if stop < 0 else stop
    if stop > start:
      yield start, stop
    start = stop + len(mark or b'')


def _check_utf8(path: pathlib.Path, data: bytes) -> None:
  try:
    data.decode()
  except UnicodeDecodeError as e:
    raise ValueError(f'{path} is not UTF-8 text: {e}') from e
