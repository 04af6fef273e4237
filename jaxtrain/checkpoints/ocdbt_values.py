"""Where each piece of an array lies in the files of an OCDBT database.

Orbax keeps arrays in OCDBT, tensorstore's B+tree of keys
(https://google.github.io/tensorstore/kvstore/ocdbt/index.html), as Zarr 2
chunks: the key 'params.w/0.1' is a chunk, 'params.w/.zarray' says how large the
chunks are. Many chunks share a file. The nodes of the tree carry checksums of
their own, the chunks do not, except for those of up to 1 KiB, which orbax has
put into the nodes.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import json
import pathlib

import tensorstore as ts

_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Span:
  """A run of bytes of a file, and what it holds.

  Attributes:
    file: Name, relative to the folder of the database.
    start: First byte.
    size: Number of bytes.
    array: Name of the array whose values these are, if they are of one.
    what: The chunk, such as '0.1', if they are; else in words, or ''.
  """

  file: str
  start: int
  size: int
  array: str | None
  what: str


def spans(
  folder: pathlib.Path, names: Mapping[str, str]
) -> tuple[list[Span], dict[str, list[list[int]]]]:
  """What the files of a database hold, as far as its newest version uses them.

  Args:
    folder: Holds manifest.ocdbt.
    names: Name of each array by the one it has in the database.

  Returns:
    Runs of bytes, and `[shape, shape of a chunk]` of arrays. Of those that
    several processes write, only one may say so.

  Raises:
    ValueError: The database cannot be read.
  """
  base = ts.KvStore.open({'driver': 'file', 'path': f'{folder}/'}).result()
  manifest = ts.ocdbt.dump(base).result()
  root = manifest['versions'][-1]['root']
  found: list[Span] = []
  grids: dict[str, list[list[int]]] = {}
  if 'location' not in root:  # Nothing was written.
    return found, grids
  for node, entries in _nodes(base, root['location'], ''):
    inline = set()
    for key, value in entries:
      array, _, what = key.rpartition('/')
      array = names.get(array, array)
      if 'indirect_value' in value:
        found.append(Span(*_place(value['indirect_value']), array, what))
      elif what == '.zarray':
        zarray = json.loads(value['inline_value'])
        grids[array] = [zarray['shape'], zarray['chunks']]
      else:
        inline.add(array)
    found.append(Span(*_place(node), None, _index(sorted(inline))))
  return found, grids


def describe(array: str, chunk: str, grid: list[list[int]] | None) -> str:
  """A chunk in words: 'params/w [64:128, 0:32]', if its size is known."""
  if grid is None:
    return f'{array} (chunk {chunk})'
  shape, size = grid
  bounds = [
    f'{int(i) * n}:{min((int(i) + 1) * n, dim)}'
    for i, n, dim in zip(chunk.split('.'), size, shape, strict=False)
  ]
  return f'{array} [{", ".join(bounds)}]'


def _nodes(base, location, prefix) -> Iterator[tuple[str, list]]:
  """Places of all nodes below one, with the keys and values of leaves."""
  node = ts.ocdbt.dump(base, location).result()
  if not node['height']:
    yield (
      location,
      [(prefix + e['key'].decode(), e) for e in node['entries']],
    )
    return
  yield location, []
  for e in node['entries']:
    below = prefix + e['subtree_common_prefix'].decode()
    yield from _nodes(base, e['location'], below)


def _place(location):
  """File, first byte and size of 'value:base:file:start:size'."""
  _, place = location.split(':', 1)
  file, start, size = place.rsplit(':', 2)
  return file.replace(':', '', 1), int(start), int(size)


def _index(inline):
  more = f' and {len(inline) - _SHOWN} more' if len(inline) > _SHOWN else ''
  held = f', which holds {", ".join(inline[:_SHOWN])}{more}' if inline else ''
  return f'the index of the arrays{held}'
