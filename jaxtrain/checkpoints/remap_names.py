"""Names of leaves: patterns, what becomes of a name, what mirrors what."""

from collections.abc import Iterable, Iterator, Mapping
import functools
import re
from typing import Any

LAYER = '{i}'
PARAMS = 'params'
_LAYER_PATTERN = r'(?P<i>\d+)'
_REFERENCE = re.compile(r'\\(\d+)')


@functools.cache
def pattern(source: str) -> re.Pattern:
  """The regular expression of a 'from'.

  Raises:
    ValueError: It is none.
  """
  try:
    return re.compile(source.replace(LAYER, _LAYER_PATTERN, 1))
  except re.error as e:
    raise ValueError(f'{source!r} is not a regular expression: {e}') from e


def matches(
  source: str, names: Iterable[str]
) -> Iterator[tuple[str, re.Match]]:
  """Names that a 'from' matches as a whole."""
  compiled = pattern(source)
  for name in names:
    if match := compiled.fullmatch(name):
      yield name, match


def num_references(to: str) -> int:
  r"""Number of groups that a 'to' needs: 2 for '\1/\2'."""
  return max(map(int, _REFERENCE.findall(to)), default=0)


def num_groups(source: str) -> int:
  """Number of groups of a 'from', `{i}` not among them."""
  compiled = pattern(source)
  return compiled.groups - ('i' in compiled.groupindex)


def expand(to: str, match: re.Match) -> str:
  r"""A 'to' with the groups of a match in place of '\1' and so on."""
  skipped = match.re.groupindex.get('i')
  groups = [
    match[k] or '' for k in range(1, match.re.groups + 1) if k != skipped
  ]
  return _REFERENCE.sub(lambda found: groups[int(found[1]) - 1], to)


def with_index(name: str, match: re.Match) -> str:
  """The name with `{i}` in place of the layer's number."""
  start, stop = match.span('i')
  return name[:start] + LAYER + name[stop:]


def literal(name: str) -> str:
  """The pattern that matches one name, or one for each `{i}`."""
  return LAYER.join(re.escape(part) for part in name.split(LAYER))


def mirrors(leaves: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
  """Which leaves are parameters, or stand for one.

  A leaf mirrors a parameter if its name ends with the parameter's and its shape
  is the same, as `jaxtrain.train_state` has it too.

  Args:
    leaves: By name, of the whole state; arrays, shapes or numbers.

  Returns:
    `{name: (prefix, name of the parameter)}`, such as
    {'opt_state/0/mu/final_norm/scale': ('opt_state/0/mu', 'final_norm/scale')}.
  """
  start = f'{PARAMS}/'
  shapes = {
    name.removeprefix(start): _shape(leaf)
    for name, leaf in leaves.items()
    if name.startswith(start)
  }
  found = {}
  for name, leaf in leaves.items():
    if name.startswith(start):
      found[name] = (PARAMS, name.removeprefix(start))
      continue
    words = name.split('/')
    for k in range(1, len(words)):
      own = '/'.join(words[k:])
      if shapes.get(own) == _shape(leaf):
        found[name] = ('/'.join(words[:k]), own)
        break
  return found


def _shape(leaf):
  return tuple(getattr(leaf, 'shape', ()))
