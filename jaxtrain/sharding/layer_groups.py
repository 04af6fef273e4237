"""Reads off a parameter tree which layers leave the model width and return.

Between two visits to the residual stream, of width D, a transformer has one or
more layers that leave D (query, key, value; gate, up) and one that comes back
(out; down). Shapes tell which is which, names only where a kernel is square.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import math
import re

Path = tuple[str, ...]

_VECTORS = {'bias', 'scale', 'b', 'beta', 'gamma'}
_NORM = re.compile(r'norm|^ln|^ln_|_ln$|scale', re.IGNORECASE)
_TABLE = re.compile(r'embed|^wte$|^wpe$|^shared$', re.IGNORECASE)
_OPENS = set(
  'q k v kv qkv query key value in gate up wi fc1 w1 w3 intermediate'.split()
)
_CLOSES = set('o out output down wo fc2 w2 proj'.split())


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A parameter, without the dimensions that stack layers."""

  path: Path
  shape: tuple[int, ...]

  @property
  def is_table(self) -> bool:
    """Whether it is an embedding."""
    named = self.path[-1] == 'embedding' or any(
      _TABLE.search(part) for part in self.path[-2:-1]
    )
    return named and len(self.shape) == 2 and self.path[-1] != 'kernel'

  @property
  def is_matrix(self) -> bool:
    """Whether it is the kernel of a layer."""
    vector = len(self.shape) < 2 or self.path[-1] in _VECTORS
    return not vector and not self.is_table

  def size(self, dims: Sequence[int]) -> int:
    """Product of some dimensions."""
    return math.prod(self.shape[d] for d in dims)


@dataclasses.dataclass(frozen=True)
class Group:
  """Layers between two visits to the model width.

  Attributes:
    opening: Layer that leaves the width -> its dimensions that do not count
      the width or experts.
    closing: The same for layers that return to it.
  """

  opening: dict[Leaf, tuple[int, ...]]
  closing: dict[Leaf, tuple[int, ...]]


def stacked_dims(shapes: Mapping[Path, tuple[int, ...]]) -> dict[Path, int]:
  """How many leading dimensions of each leaf stack layers (`nn.scan`).

  A subtree is stacked if all its leaves share the leading size and the scale of
  a norm, a vector by nature, has more than one dimension.
  """
  found = dict.fromkeys(shapes, 0)

  def visit(members, depth):
    rest = [shapes[p][found[p] :] for p in members]
    has_norm = any(_NORM.search(part) for p in members for part in p[-2:])
    while (
      has_norm and min(map(len, rest)) > 1 and len({s[0] for s in rest}) == 1
    ):
      for p in members:
        found[p] += 1
      rest = [s[1:] for s in rest]
    for child in _children(members, depth).values():
      visit(child, depth + 1)

  visit(list(shapes), 0)
  return found


def _children(paths, depth):
  """Paths by the name that follows, without the leaves of this node."""
  found = collections.defaultdict(list)
  for p in paths:
    if len(p) > depth + 1:
      found[p[depth]].append(p)
  return found


def find_groups(leaves: Sequence[Leaf], vocab: int | None) -> list[Group]:
  """Joins the layers of a tree, bottom-up, until some open and some close.

  Args:
    leaves: All parameters.
    vocab: Size of the vocabulary; layers that lead to it are left alone.

  Returns:
    Disjoint groups; a layer without a partner is in none.
  """
  layers = {x.path: x for x in leaves if x.is_matrix}
  votes = collections.Counter(
    size for x in leaves if len(x.shape) > 1 for size in set(x.shape)
  )
  votes.update(x.shape[0] for x in leaves if len(x.shape) == 1)
  groups = []

  def visit(paths, depth):
    pending = [layers[p] for p in paths if len(p) == depth + 1]
    for child in _children(paths, depth).values():
      pending += visit(child, depth + 1)
    group = _complete(pending, depth, votes, vocab)
    if group is None:
      return pending
    groups.append(group)
    return [x for x in pending if x not in group.opening | group.closing]

  left = visit(list(layers), 0)
  return groups + _pairs([x for x in left if x.shape[-1] != vocab])


def _complete(pending, depth, votes, vocab):
  """The group that `pending` layers below one node form, or `None`."""
  pending = [x for x in pending if not _is_numbered(x)]
  if len(pending) < 2:
    return None
  opening, closing, unclear = _roles(pending, depth, votes)
  if len(unclear) == 1 and opening and not closing:
    x, dims = unclear.popitem()
    closing[x] = dims[:-1]
  # Whole multiples: query, key and value, or gate and up, in one kernel.
  widths = {x.size(dims) for x, dims in opening.items()}
  closing = {
    x: dims
    for x, dims in closing.items()
    if any(w % x.size(dims) == 0 for w in widths)
  }
  if vocab not in {x.size(dims) for x, dims in closing.items()}:
    opening = {x: d for x, d in opening.items() if x.shape[-1] != vocab}
  return Group(opening, closing) if opening and closing else None


def _roles(pending, depth, votes):
  """Layers that leave the width, that return to it, and that may do either."""
  width = _width(pending, votes)
  # [E, D, F]: the leading dimension counts experts, in [E, F, D] too.
  experts = {
    x.shape[0]
    for x in pending
    if len(x.shape) == 3
    and x.shape[1] == width
    and width not in (x.shape[0], x.shape[2])
  }
  opening, closing, unclear = {}, {}, {}
  for x in pending:
    batch = int(len(x.shape) == 3 and x.shape[0] in experts)
    first, last = x.shape[batch] == width, x.shape[-1] == width
    dims = tuple(range(batch, len(x.shape)))
    if first and last:
      words = tokens(x.path[depth:])
      first = bool(words & _OPENS)
      last = not first and bool(words & _CLOSES)
      if not first and not last:
        unclear[x] = dims
    if first:
      opening[x] = dims[1:]
    elif last:
      closing[x] = dims[:-1]
  return opening, closing, unclear


def _width(pending, votes):
  """The size that most of the layers share, and most of the tree."""
  shared = collections.Counter(s for x in pending for s in set(x.shape))
  ends = collections.Counter(
    s for x in pending for s in {x.shape[0], x.shape[-1]}
  )
  return max(shared, key=lambda s: (shared[s], votes[s], ends[s], -s))


def _pairs(left):
  """Consecutive siblings, two by two: Dense_0 and Dense_1, ..."""
  siblings = collections.defaultdict(list)
  for x in left:
    if len(x.shape) == 2 and _is_numbered(x):
      siblings[x.path[:-2]].append(x)
  groups = []
  for layers in siblings.values():
    layers.sort(key=lambda x: int(re.findall(r'\d+', x.path[-2])[-1]))
    while len(layers) > 1:
      a, b, *layers = layers
      if a.shape[1] == b.shape[0]:
        groups.append(Group({a: (1,)}, {b: (0,)}))
      else:
        layers = [b, *layers]
  return groups


def _is_numbered(x):
  """Whether the layer has a number for a name, as 'Dense_0'."""
  words = tokens(x.path[-2:-1])
  return bool(
    re.search(r'\d$', ''.join(x.path[-2:-1])) and not words & (_OPENS | _CLOSES)
  )


def tokens(parts: Sequence[str]) -> set[str]:
  """Words of names: ('DenseReluDense', 'wi_0') -> {'dense', .., 'wi', '0'}."""
  words = re.sub(r'([a-z])([A-Z])', r'\1_\2', '_'.join(parts))
  return set(words.lower().split('_'))
