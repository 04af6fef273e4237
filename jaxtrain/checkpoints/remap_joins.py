"""Rules that make one leaf of several, or several of one.

`remap_rules` says what a rule is.
"""

from collections.abc import Iterator, Sequence
import dataclasses
from typing import Any

from jaxtrain.checkpoints import remap_names
from jaxtrain.checkpoints import views
from jaxtrain.checkpoints.remap_rules import Change
from jaxtrain.checkpoints.remap_rules import Leaves
from jaxtrain.checkpoints.remap_rules import Misfit
from jaxtrain.checkpoints.remap_rules import check_dim


@dataclasses.dataclass(frozen=True)
class Stack:
  r"""Layers in one array: {'from': 'layers/{i}/(.*)', 'to': 'layers/\\1'}.

  Attributes:
    source: Pattern with `{i}`.
    to: Name of the stack.
    dim: The new dimension.
  """

  source: str
  to: str
  dim: int = 0

  def apply(self, leaves: Leaves) -> Iterator[Change]:
    """Yields a change for every stack."""
    found: dict[str, dict[int, Any]] = {}
    for name, match in remap_names.matches(self.source, leaves):
      new = remap_names.expand(self.to, match)
      layers = found.setdefault(new, {})
      first, _ = layers.setdefault(int(match['i']), (name, match))
      if first != name:
        fault = f'{new}: {first} and {name} are the same part of it'
        yield Change((), {new: None}, fault)
    for new, layers in found.items():
      names = tuple(layers[i][0] for i in sorted(layers))
      try:
        leaf = self._stack(leaves, layers, names)
      except Misfit as e:
        yield Change(names, {new: None}, f'{new}: {e}')
        continue
      first = layers[0]
      template = remap_names.with_index(*first)

      def undo(prefix, new=new, template=template):
        return {
          'rule': 'unstack',
          'from': remap_names.literal(prefix + new),
          'to': prefix + template,
          'dim': self.dim,
        }

      yield Change(names, {new: leaf}, undo=undo)

  def _stack(self, leaves, layers, names):
    if missing := sorted(set(range(max(layers) + 1)) - set(layers)):
      raise Misfit(f'layers {missing} of {max(layers) + 1} are missing')
    parts = [leaves[name] for name in names]
    _check_alike(names, parts, None)
    dim = check_dim(self.dim, (1, *parts[0].view.shape))
    shape = list(parts[0].view.shape)
    shape.insert(dim, 1)
    view = views.join([views.reshape(p.view, shape) for p in parts], dim)
    return parts[0].then(view, f'stack of {len(parts)} along {dim}')


@dataclasses.dataclass(frozen=True)
class Unstack:
  r"""A stack as layers: {'from': 'layers/(.*)', 'to': 'layers/{i}/\\1'}.

  Attributes:
    source: Pattern.
    to: Names of the layers, with `{i}`.
    dim: The dimension that numbers them.
  """

  source: str
  to: str
  dim: int = 0

  def apply(self, leaves: Leaves) -> Iterator[Change]:
    """Yields a change for every stack."""
    for name, match in remap_names.matches(self.source, leaves):
      leaf = leaves[name]
      try:
        dim = check_dim(self.dim, leaf.view.shape)
      except Misfit as e:
        yield Change((name,), {}, f'{name}: {e}')
        continue
      shape = leaf.view.shape
      rest = shape[:dim] + shape[dim + 1 :]
      template = remap_names.expand(self.to, match)
      made = {}
      for i in range(shape[dim]):
        view = views.reshape(views.cut(leaf.view, dim, i, i + 1), rest)
        new = template.replace(remap_names.LAYER, str(i))
        made[new] = leaf.then(view, f'layer {i} of {shape[dim]}')

      def undo(prefix, name=name, template=template, dim=dim):
        return {
          'rule': 'stack',
          'from': remap_names.literal(prefix + template),
          'to': prefix + name,
          'dim': dim,
        }

      yield Change((name,), made, undo=undo)


@dataclasses.dataclass(frozen=True)
class Split:
  """A dimension in several leaves, such as a fused qkv.

  Attributes:
    source: Pattern.
    to: A name for each part.
    sizes: Of the parts.
    dim: Which dimension.
    groups: The dimension is this many runs, each with its share of every part:
      kv heads, of a qkv stored by kv head.
  """

  source: str
  to: tuple[str, ...]
  sizes: tuple[int, ...]
  dim: int = 0
  groups: int = 1

  def apply(self, leaves: Leaves) -> Iterator[Change]:
    """Yields a change for every leaf that matches."""
    for name, match in remap_names.matches(self.source, leaves):
      leaf = leaves[name]
      news = [remap_names.expand(to, match) for to in self.to]
      try:
        dim = check_dim(self.dim, leaf.view.shape)
        parts = list(self._split(leaf.view, dim))
      except Misfit as e:
        yield Change((name,), dict.fromkeys(news), f'{name}: {e}')
        continue
      made = {
        new: leaf.then(part, f'part {i + 1} of {len(news)} along {dim}')
        for i, (new, part) in enumerate(zip(news, parts, strict=True))
      }

      def undo(prefix, name=name, news=news, dim=dim):
        return {
          'rule': 'fuse',
          'from': [remap_names.literal(prefix + new) for new in news],
          'to': prefix + name,
          'dim': dim,
          'groups': self.groups,
        }

      yield Change((name,), made, undo=undo)

  def _split(self, view, dim):
    shape, groups = view.shape, self.groups
    wanted = (*shape[:dim], sum(self.sizes), *shape[dim + 1 :])
    if wanted != shape:
      raise Misfit(
        f'has shape {shape}, but parts of {self.sizes} need {wanted}'
      )
    _check_groups(self.sizes, groups)
    runs = (*shape[:dim], groups, shape[dim] // groups, *shape[dim + 1 :])
    grouped, start = views.reshape(view, runs), 0
    for size in self.sizes:
      part = views.cut(grouped, dim + 1, start, start + size // groups)
      start += size // groups
      yield views.reshape(part, (*shape[:dim], size, *shape[dim + 1 :]))


@dataclasses.dataclass(frozen=True)
class Fuse:
  """Several leaves as one: the reverse of 'split'.

  Attributes:
    source: A pattern for each part; those that give the same `to` are joined.
    to: Name of the whole.
    dim: Which dimension.
    groups: See 'split'.
  """

  source: tuple[str, ...]
  to: str
  dim: int = 0
  groups: int = 1

  def apply(self, leaves: Leaves) -> Iterator[Change]:
    """Yields a change for every leaf that is made."""
    found: dict[str, dict[int, str]] = {}
    for k, pattern in enumerate(self.source):
      for name, match in remap_names.matches(pattern, leaves):
        new = remap_names.expand(self.to, match)
        first = found.setdefault(new, {}).setdefault(k, name)
        if first != name:
          fault = f'{new}: {first} and {name} are the same part of it'
          yield Change((), {new: None}, fault)
    for new, parts in found.items():
      names = tuple(parts.values())
      try:
        if missing := [p for k, p in enumerate(self.source) if k not in parts]:
          raise Misfit(f'nothing matches {missing}, but there is {names[0]}')
        leaf = self._fuse(leaves, names)
      except Misfit as e:
        yield Change(names, {new: None}, f'{new}: {e}')
        continue

      dim = check_dim(self.dim, leaf.view.shape)
      sizes = [leaves[n].view.shape[dim] for n in names]

      def undo(prefix, new=new, names=names, dim=dim, sizes=sizes):
        return {
          'rule': 'split',
          'from': remap_names.literal(prefix + new),
          'to': [prefix + name for name in names],
          'sizes': sizes,
          'dim': dim,
          'groups': self.groups,
        }

      yield Change(names, {new: leaf}, undo=undo)

  def _fuse(self, leaves, names):
    parts = [leaves[name] for name in names]
    dim = check_dim(self.dim, parts[0].view.shape)
    _check_alike(names, parts, dim)
    sizes = [p.view.shape[dim] for p in parts]
    _check_groups(sizes, self.groups)
    shape = parts[0].view.shape

    def runs(view):
      size = view.shape[dim] // self.groups
      new = (*shape[:dim], self.groups, size, *shape[dim + 1 :])
      return views.reshape(view, new)

    joined = views.join([runs(p.view) for p in parts], dim + 1)
    view = views.reshape(joined, (*shape[:dim], sum(sizes), *shape[dim + 1 :]))
    return parts[0].then(view, f'{len(parts)} parts along {dim}')


def _check_alike(names, parts, dim):
  """Refuses parts that cannot be joined along `dim` (`None`: a new one)."""
  first = parts[0].view
  for name, part in zip(names[1:], parts[1:], strict=True):
    view = part.view
    alike = len(view.shape) == len(first.shape) and all(
      a == b
      for k, (a, b) in enumerate(zip(view.shape, first.shape, strict=True))
      if k != dim
    )
    if not alike or view.dtype != first.dtype:
      raise Misfit(
        f'{names[0]} is {first.dtype}{list(first.shape)}, but {name} is '
        f'{view.dtype}{list(view.shape)}'
      )


def _check_groups(sizes: Sequence[int], groups: int) -> None:
  if bad := [size for size in sizes if size % groups]:
    raise Misfit(f'parts of {bad} are not divisible by groups={groups}')
