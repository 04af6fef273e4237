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
    what: In words: 'params/w [0:64, 0:32]', or what depends on an index.
  """

  file: str
  start: int
  size: int
  array: str | None
  what: str


def spans(folder: pathlib.Path, names: Mapping[str, str]) -> list[Span]:
  """What the files of a database hold, as far as its newest version uses them.

  Args:
    folder: Holds manifest.ocdbt.
    names: Name of each array by the one it has in the database.

  Raises:
    ValueError: The database cannot be read.
  """
  base = ts.KvStore.open({'driver': 'file', 'path': f'{folder}/'}).result()
  manifest = ts.ocdbt.dump(base).result()
  root = manifest['versions'][-1]['root']
  if 'location' not in root:  # Nothing was written.
    return []
  found: list[Span] = []
  chunks: dict[str, tuple[str, str]] = {}
  shapes: dict[str, dict] = {}
  for node, entries in _nodes(base, root['location'], ''):
    inline = []
    for key, value in entries:
      if 'indirect_value' in value:
        chunks[key] = value['indirect_value']
        continue
      array, _, what = key.rpartition('/')
      if what == '.zarray':
        shapes[array] = json.loads(value['inline_value'])
      else:
        inline.append(names.get(array, array))
    found.append(Span(*_place(node), None, _index(inline)))
  for key, location in chunks.items():
    array, _, chunk = key.rpartition('/')
    name = names.get(array, array)
    where = _rectangle(shapes.get(array), chunk)
    found.append(Span(*_place(location), name, f'{name} {where}'))
  return found


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
  inline = sorted(set(inline))
  more = f' and {len(inline) - _SHOWN} more' if len(inline) > _SHOWN else ''
  held = f', which holds {", ".join(inline[:_SHOWN])}{more}' if inline else ''
  return f'the index of the arrays{held}'


def _rectangle(zarray, chunk):
  """'[64:128, 0:32]' of chunk '1.0', or its name if its size is unknown."""
  if zarray is None:
    return f'(chunk {chunk})'
  if not zarray['shape']:
    return '[]'
  bounds = []
  for i, size, dim in zip(
    chunk.split(zarray.get('dimension_separator', '.')),
    zarray['chunks'],
    zarray['shape'],
    strict=True,
  ):
    bounds.append(f'{int(i) * size}:{min((int(i) + 1) * size, dim)}')
  return f'[{", ".join(bounds)}]'
