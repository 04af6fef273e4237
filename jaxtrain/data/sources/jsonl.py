"""JSON lines: one object a line, the document under one of its keys."""

from collections.abc import Iterator, Sequence
import functools
import json
import os
import pathlib

import numpy as np
import tqdm

from jaxtrain.data.sources import base


def jsonl(
  files: str | os.PathLike | Sequence[str | os.PathLike],
  *,
  split: str = 'train',
  text_key: str = 'text',
  validation_fraction: float = 0.0,
) -> Sequence[str]:
  """Documents of JSONL files.

  All lines are checked at once, so that a bad one stops a run at its start.

  Args:
    files: Paths or globs.
    split: 'train' or 'validation'.
    text_key: Key of the document in each object.
    validation_fraction: Share of the documents held out of training.

  Returns:
    The documents, read when asked for. Blank lines and empty texts are left
    out.

  Raises:
    ValueError: A missing file, a glob without matches, a line (its file and
      number are named) that is not a JSON object or has no text under
      `text_key`, or no document in the split.
  """
  base.check_split(split, validation_fraction)
  paths = base.find_files(files)
  size = sum(p.stat().st_size for p in paths)
  spans = []
  with tqdm.tqdm(
    desc='reading jsonl', total=size, unit='B', unit_scale=True, delay=2
  ) as bar:
    for i, path in enumerate(paths):
      for start, stop, document in _lines(path, text_key):
        bar.update(stop - start)
        if document and base.in_split(
          document.encode('utf-8', 'replace'), split, validation_fraction
        ):
          spans.append((i, start, stop))
  base.check_found(len(spans), f'{len(paths)} jsonl files', split)
  return base.FileDocuments(
    paths,
    np.array(spans, np.int64),
    functools.partial(_parse, text_key=text_key),
  )


def _parse(line: bytes, text_key: str) -> str:
  return json.loads(line)[text_key]


def _lines(path: pathlib.Path, text_key: str) -> Iterator[tuple[int, int, str]]:
  stop = 0
  with path.open('rb') as f:
    for number, line in enumerate(f, start=1):
      start, stop = stop, stop + len(line)
      if line.isspace():
        continue
      try:
        value = json.loads(line)
      except ValueError as e:
        raise ValueError(f'{path}:{number}: not JSON: {e}') from e
      if not isinstance(value, dict):
        raise ValueError(f'{path}:{number}: not a JSON object')
      if text_key not in value:
        raise ValueError(
          f'{path}:{number}: no key {text_key!r}; it has '
          f'{", ".join(map(repr, value)) or "none"}'
        )
      if not isinstance(value[text_key], str):
        raise ValueError(f'{path}:{number}: {text_key!r} is not a string')
      yield start, stop, value[text_key]
