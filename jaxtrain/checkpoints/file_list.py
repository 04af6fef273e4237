"""A list of a checkpoint's files and checksums, to notice and name damage.

Neither orbax nor tensorstore notices a flipped bit inside an array: of OCDBT
only the index carries checksums. The list has one checksum (XXH3, 64 bits) per
piece of an array, which names what is damaged, and one per file that holds no
arrays. Each process makes those of the files that it wrote (`write_share`),
and process 0 puts them together just before the checkpoint gets its final name
(`write`).

Not in the list: the two files that orbax writes into the checkpoint's own
folder afterwards (times and the mark of the end; nothing is restored from
them). In a bucket there is no list: such stores keep checksums themselves.
"""

from collections.abc import Callable, Iterable, Mapping
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import threading

import xxhash

from jaxtrain.checkpoints import ocdbt_values
from jaxtrain.checkpoints.ocdbt_values import Span

NAME = 'files.json'
_HASH = 'xxh3_64'
_SHARE = 'checksums_of_process_'
_BLOCK = 1 << 24
_SHOWN = 4
_THREADS = min(8, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class Piece:
  """A run of bytes of one file of a checkpoint.

  Attributes:
    span: Where it lies and what it is; its file is relative to the checkpoint.
    digest: XXH3 of the bytes, 16 hexadecimal digits.
  """

  span: Span
  digest: str


@dataclasses.dataclass(frozen=True)
class FileList:
  """What the files of a checkpoint were when it was written.

  Attributes:
    sizes: Bytes of each file.
    pieces: Cover all files. None in lists of old checkpoints.
    grids: `[shape, shape of a chunk]` of arrays.
  """

  sizes: dict[str, int]
  pieces: list[Piece]
  grids: dict[str, list[list[int]]]


def write_share(
  folder: pathlib.Path,
  process: int,
  spans: Iterable[Span],
  grids: Mapping[str, list[list[int]]],
) -> None:
  """Writes the checksums of the files that a process wrote into an item.

  Args:
    folder: Of the item; names in `spans` are relative to it.
    process: Number of the process.
    spans: What is known of the files' contents. Bytes between are pieces of
      their own.
    grids: Of arrays, as far as this process knows.
  """
  by_file: dict[str, list[Span]] = {}
  for span in spans:
    by_file.setdefault(span.file, []).append(span)
  whole = [
    span
    for file, known in by_file.items()
    for span in _cover(file, os.path.getsize(folder / file), known)
  ]
  pieces = [_to_json(p) for p in _digest(folder, whole)]
  (folder / f'{_SHARE}{process}.json').write_text(
    json.dumps({'pieces': pieces, 'grids': grids})
  )


def write(folder: pathlib.Path) -> None:
  """Writes the list of all files in the folders of a checkpoint.

  Their shares (`write_share`) are taken over and removed; files that are in
  none are read here. All is on the disk when this returns, whatever becomes of
  the machine.
  """
  pieces, grids = [], {}
  for path in sorted(folder.glob(f'*/{_SHARE}*.json')):
    share = json.loads(path.read_text())
    grids |= share['grids']
    for piece in map(_from_json, share['pieces']):
      file = f'{path.parent.name}/{piece.span.file}'
      span = dataclasses.replace(piece.span, file=file)
      pieces.append(dataclasses.replace(piece, span=span))
    path.unlink()
  sizes = _sizes(folder)
  known = {piece.span.file for piece in pieces}
  rest = [Span(f, 0, n, None, '') for f, n in sizes.items() if f not in known]
  pieces += _digest(folder, rest)
  listed = {
    'hash': _HASH,
    'bytes': sizes,
    'grids': grids,
    'pieces': [_to_json(p) for p in pieces],
  }
  text = json.dumps({'list': listed, 'digest': _digest_of(listed)})
  (folder / NAME).write_text(text)
  folders = {os.path.dirname(f) for f in sizes}
  sync(folder, [NAME, *folders, *(f for f in sizes if f not in known)])


def read(folder: pathlib.Path) -> FileList | None:
  """The list of a checkpoint, `None` if it has none.

  Raises:
    ValueError: The list is unreadable.
  """
  path = folder / NAME
  if not path.exists():
    return None
  try:
    text = json.loads(path.read_text())
    if 'digest' not in text:
      return FileList({f: int(n) for f, n in text.items()}, [], {})
    listed = text['list']
    if listed['hash'] != _HASH:
      raise ValueError(f'the hash {listed["hash"]!r} is not {_HASH!r}')
    if text['digest'] != _digest_of(listed):
      raise ValueError('it is not what was written')
    pieces = [_from_json(p) for p in listed['pieces']]
    return FileList(listed['bytes'], pieces, listed['grids'])
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    raise ValueError(f'{NAME} is unreadable: {e}') from e


def check_sizes(folder: pathlib.Path, listed: FileList) -> None:
  """Compares the files in the folders of `folder` to their listed sizes.

  Raises:
    ValueError: Names a file that is missing or of another size, and what it
      holds.
  """
  found = _sizes(folder)
  for name, size in listed.sizes.items():
    if name not in found:
      raise ValueError(f'{name} is missing{_holding(listed, name, 0)}')
    if found[name] != size:
      held = _holding(listed, name, min(found[name], size))
      raise ValueError(
        f'{name} has {found[name]} bytes instead of {size}{held}'
      )


def damage(
  folder: pathlib.Path,
  pieces: Iterable[Piece],
  grids: Mapping[str, list[list[int]]],
  progress: Callable[[int], object] = lambda num_bytes: None,
) -> list[str]:
  """Reads pieces of files; says which are not what was written.

  Args:
    folder: Of the checkpoint.
    pieces: Which to read, by several threads.
    grids: Of the list.
    progress: Called with the number of bytes read since the last call.
  """
  pieces = list(pieces)
  found = _digest(folder, [p.span for p in pieces], progress)
  return [
    _describe(listed.span, grids)
    for listed, now in zip(pieces, found, strict=True)
    if listed.digest != now.digest
  ]


def share(pieces: list[Piece], index: int, count: int) -> list[Piece]:
  """The `index`-th of `count` parts of `pieces` of about as many bytes."""
  total = sum(p.span.size for p in pieces)
  chosen, before = [], 0
  for piece in pieces:
    if before * count // max(total, 1) == index:
      chosen.append(piece)
    before += piece.span.size
  return chosen


def join(faults: list[str]) -> str:
  """A message of several faults, the first few in full."""
  return _some(faults, '; ')


def sync(folder: pathlib.Path, files: Iterable[str] = ()) -> None:
  """Has files of a folder, and the folder's own entries, put on the disk.

  Tensorstore does it for the arrays, orbax for nothing.
  """
  for name in (*files, '.'):
    fd = os.open(folder / name, os.O_RDONLY)
    try:
      os.fsync(fd)
    finally:
      os.close(fd)


def _describe(span, grids):
  if not span.what:
    return f'{span.file} is not what was written'
  what = span.what
  if span.array is not None:
    what = ocdbt_values.describe(span.array, what, grids.get(span.array))
  return (
    f'bytes {span.start}:{span.start + span.size} of {span.file} are not what '
    f'was written: {what}'
  )


def _holding(listed, name, end):
  """Which pieces of arrays a file holds that end after a byte."""
  held = [
    ocdbt_values.describe(s.array, s.what, listed.grids.get(s.array))
    for s in (p.span for p in listed.pieces)
    if s.file == name and s.array and s.start + s.size > end
  ]
  return f'; it held {_some(held)}' if held else ''


def _some(words, separator=', '):
  more = len(words) - _SHOWN
  text = separator.join(words[:_SHOWN])
  return f'{text}{separator}and {more} more' if more > 0 else text


def _digest_of(listed):
  return xxhash.xxh3_64_hexdigest(json.dumps(listed).encode())


def _cover(file, size, known):
  """`known` spans of a file in order, and the bytes between them."""
  end = 0
  for span in sorted(known, key=lambda s: s.start):
    if span.start > end:
      yield Span(file, end, span.start - end, None, 'of no array')
    yield span
    end = span.start + span.size
  if size > end:
    yield Span(file, end, size - end, None, 'of no array')


def _digest(folder, spans, progress=lambda num_bytes: None) -> list[Piece]:
  """Checksums of runs of bytes, by several threads."""

  lock = threading.Lock()

  def one(span):
    digest = xxhash.xxh3_64()
    try:
      with open(folder / span.file, 'rb', buffering=0) as f:
        f.seek(span.start)
        left = span.size
        while left and (block := f.read(min(left, _BLOCK))):
          digest.update(block)
          left -= len(block)
          with lock:  # Progress bars are no thread's friend.
            progress(len(block))
    except FileNotFoundError:
      return Piece(span, 'missing')
    return Piece(span, digest.hexdigest())

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return list(pool.map(one, spans))


def _sizes(folder):
  sizes = {}
  for parent, _, names in os.walk(folder):
    if parent == os.fspath(folder):
      continue  # Orbax still writes there.
    for name in names:
      path = os.path.join(parent, name)
      sizes[os.path.relpath(path, folder)] = os.path.getsize(path)
  return sizes


def _to_json(piece):
  return [*dataclasses.astuple(piece.span), piece.digest]


def _from_json(row):
  *span, digest = row
  return Piece(Span(*span), digest)
