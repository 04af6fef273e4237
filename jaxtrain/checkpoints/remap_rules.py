r"""Rules that turn the leaves of one checkpoint into those of another.

Universal Checkpointing (Lian et al., https://arxiv.org/abs/2406.18820) makes
one file of whole parameters out of the shards of each rank, by a language of
patterns over parameter names, and any layout out of that. Here checkpoints hold
whole parameters already, in rectangles, so that what is left to say is where
the tree itself has changed. Written from the paper's abstract and summaries of
its language, not its text.

A rule is a JSON object, or a dict: 'rule' and its arguments,

  {'rule': 'rename', 'from': 'blocks/(.*)', 'to': r'layers/\1'}

'from' is a regular expression of the whole name, 'to' may refer to its groups.
`{i}` stands for the number of a layer (and is no group). Names are those of
parameters, such as 'layers/mlp/up/kernel', and what mirrors a parameter (its
moments, averages) goes the same way. A name that begins with '/' is that of a
leaf of the whole state: '/opt_state/0/count', '/params/embed/embedding'.

Each rule is a small class below. `apply` takes the leaves of the parameters, or
of one of their mirrors, and yields what changes; nothing is read.
"""

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtrain.checkpoints import remap_names
from jaxtrain.checkpoints import views


@dataclasses.dataclass(frozen=True)
class Leaf:
  """An array on its way, and in words what has been done to it."""

  view: views.View
  how: tuple[str, ...] = ()

  def then(self, view: views.View, how: str) -> 'Leaf':
    """The next stage."""
    return Leaf(view, (*self.how, how))


@dataclasses.dataclass(frozen=True)
class Change:
  """What a rule does with some leaves.

  Attributes:
    taken: Names that go.
    made: Names that come.
    fault: Why nothing can be made; then `made` has the names alone.
    undo: From the prefix of names to the rule that undoes this; `None` if
      nothing does.
    is_move: Whether elements keep their places.
  """

  taken: tuple[str, ...]
  made: Mapping[str, Leaf | None]
  fault: str = ''
  undo: Callable[[str], dict[str, Any]] | None = None
  is_move: bool = False


Leaves = Mapping[str, Leaf]


class Misfit(ValueError):
  """What a leaf has, that a rule cannot take."""


@dataclasses.dataclass(frozen=True)
class OneByOne(abc.ABC):
  """A rule for leaves that each become one leaf of the same name."""

  source: str

  def apply(self, leaves: Leaves) -> Iterator[Change]:
    """Yields a change for every leaf that matches."""
    for name, _ in remap_names.matches(self.source, leaves):
      leaf = leaves[name]
      try:
        view, how, undo = self.change(leaf.view)
      except Misfit as e:
        yield Change((name,), {name: None}, f'{name}: {e}')
        continue
      made = {name: leaf.then(view, how)}
      yield Change((name,), made, undo=undo and _undo_at(name, undo))

  @abc.abstractmethod
  def change(
    self, view: views.View
  ) -> tuple[views.View, str, dict[str, Any] | None]:
    """What it becomes, what that is in words, and the rule that undoes it."""


@dataclasses.dataclass(frozen=True)
class Rename:
  r"""Another name: {'from': 'blocks/(.*)', 'to': 'layers/\\1'}."""

  source: str
  to: str

  def apply(self, leaves: Leaves) -> Iterator[Change]:
    """Yields a change for every leaf that matches."""
    for name, match in remap_names.matches(self.source, leaves):
      new = remap_names.expand(self.to, match)

      def undo(prefix, name=name, new=new):
        return {
          'rule': 'rename',
          'from': remap_names.literal(prefix + new),
          'to': prefix + name,
        }

      leaf = leaves[name]
      made = {new: leaf.then(leaf.view, 'rename')}
      yield Change((name,), made, undo=undo, is_move=True)


@dataclasses.dataclass(frozen=True)
class Drop:
  """Left out."""

  source: str

  def apply(self, leaves: Leaves) -> Iterator[Change]:
    """Yields a change for every leaf that matches."""
    for name, _ in remap_names.matches(self.source, leaves):
      yield Change((name,), {}, is_move=True)


@dataclasses.dataclass(frozen=True)
class Transpose(OneByOne):
  """Dimensions in another order: {'from': '.*/kernel', 'order': [1, 0]}."""

  order: tuple[int, ...]

  def change(self, view):
    """See `OneByOne`."""
    if sorted(self.order) != list(range(len(view.shape))):
      raise Misfit(f'has shape {view.shape}, which order {self.order} does not')
    how = f'transpose {",".join(map(str, self.order))}'
    back = [int(i) for i in np.argsort(self.order)]
    undo = {'rule': 'transpose', 'order': back}
    return views.transpose(view, self.order), how, undo


@dataclasses.dataclass(frozen=True)
class Reshape(OneByOne):
  """The same elements in another shape, in which -1 is what is left."""

  shape: tuple[int, ...]

  def change(self, view):
    """See `OneByOne`."""
    size, known = math.prod(view.shape), -math.prod(self.shape)
    shape = self.shape
    if -1 in shape and known > 0 and size % known == 0:
      shape = tuple(size // known if d == -1 else d for d in shape)
    if math.prod(shape) != size or min(shape, default=0) < 0:
      raise Misfit(f'has shape {view.shape}, which {self.shape} does not hold')
    undo = {'rule': 'reshape', 'shape': list(view.shape)}
    return views.reshape(view, shape), f'reshape to {shape}', undo


@dataclasses.dataclass(frozen=True)
class Cast(OneByOne):
  """Another dtype of floats, rounded to the nearest.

  What mirrors a parameter in another dtype than the parameter's keeps it.
  """

  dtype: str

  def change(self, view):
    """See `OneByOne`."""
    new = jnp.dtype(self.dtype)
    if not jnp.issubdtype(view.dtype, jnp.floating):
      raise Misfit(f'is {view.dtype}, and only floats are cast')
    # Back from a wider type is exact, from a narrower one it is not.
    undo = {'rule': 'cast', 'dtype': view.dtype.name}
    if jnp.promote_types(view.dtype, new) != new:
      undo = None
    how = f'cast {view.dtype} to {new}'
    return views.cast(view, new), how, undo


@dataclasses.dataclass(frozen=True)
class Pad(OneByOne):
  """A dimension filled up, to a size or to a multiple.

  Attributes:
    source: Pattern.
    dim: Which dimension.
    size: Of the result; 0 where `multiple` is given.
    multiple: The result is the next multiple of this.
    value: What is put there. A vocabulary's new rows of zeros have the logit 0,
      thus a share of the probability.
  """

  dim: int
  size: int = 0
  multiple: int = 0
  value: float = 0.0

  def change(self, view):
    """See `OneByOne`."""
    dim = check_dim(self.dim, view.shape)
    here = view.shape[dim]
    size = self.size or -(-here // self.multiple) * self.multiple
    if size < here:
      raise Misfit(f'has shape {view.shape}, more than {size} along {dim}')
    undo = {'rule': 'cut', 'dim': dim, 'size': here}
    how = f'pad {here} to {size} along {dim}'
    return views.pad(view, dim, size, self.value), how, undo


@dataclasses.dataclass(frozen=True)
class Cut(OneByOne):
  """The first `size` of a dimension."""

  dim: int
  size: int

  def change(self, view):
    """See `OneByOne`."""
    dim = check_dim(self.dim, view.shape)
    if self.size > view.shape[dim]:
      raise Misfit(f'has shape {view.shape}, less than {self.size} along {dim}')
    how = f'cut {view.shape[dim]} to {self.size} along {dim}'
    return views.cut(view, dim, 0, self.size), how, None


def check_dim(dim: int, shape: Sequence[int]) -> int:
  """The dimension, counted from the front.

  Raises:
    Misfit: There is no such dimension.
  """
  if not -len(shape) <= dim < len(shape):
    raise Misfit(f'has shape {tuple(shape)}, and no dimension {dim}')
  return dim % len(shape)


def _undo_at(name, undo):
  return lambda prefix: {**undo, 'from': remap_names.literal(prefix + name)}
