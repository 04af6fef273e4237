"""The leaves of a checkpoint on their way through the rules."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxtrain.checkpoints import remap_names
from jaxtrain.checkpoints import remap_optimizer
from jaxtrain.checkpoints import views
from jaxtrain.checkpoints.remap_language import Init
from jaxtrain.checkpoints.remap_language import Optimizer
from jaxtrain.checkpoints.remap_rules import Cast
from jaxtrain.checkpoints.remap_rules import Leaf

_ROOT = '/'
_SHOWN = 8


class Tree:
  """The leaves between two rules, and what went wrong so far.

  Attributes:
    leaves: By name, of the whole state.
    dropped: Leaves that are left out, and by which rule.
    faults: All that is wrong.
    undo: Rules that undo those applied so far, first one first.
    lost: Names of what these do not bring back.
  """

  def __init__(self, leaves: Mapping[str, views.View]):
    self.leaves = {name: Leaf(view) for name, view in leaves.items()}
    self.dropped: list[tuple[Leaf, str]] = []
    self.faults: list[str] = []
    self.undo: list[dict[str, Any]] = []
    self.lost: list[str] = []
    self._new: set[str] = set()  # Wanted leaves that the checkpoint lacks.
    self._writers: dict[str, str] = {}
    self._failed: set[str] = set()

  def apply(self, rule: Any, name: str) -> None:
    """Applies a rule to the parameters and all that mirrors them.

    Args:
      rule: Of `remap_rules` or `remap_joins`.
      name: What errors call it.
    """
    changes = []
    for prefix, scope in self._scopes(rule).items():
      changes += [(prefix, change) for change in rule.apply(scope)]
    if not changes:
      self.faults.append(f'{name}: nothing matches {rule.source!r}')
    # All go before any come, so that names can be exchanged.
    for prefix, change in changes:
      self._take(prefix, change, name)
    for prefix, change in changes:
      self._put(prefix, change, name)

  def init(self, rule: Init, target: Mapping[str, Any], name: str) -> None:
    """Notes which wanted leaves are to be new."""
    scope = set()
    if rule.source.startswith(_ROOT):
      names = {_ROOT + full: full for full in target}
      scope = {names[n] for n, _ in remap_names.matches(rule.source, names)}
    else:
      for full, (_, own) in remap_names.mirrors(target).items():
        if any(remap_names.matches(rule.source, [own])):
          scope.add(full)
    if not scope:
      self.faults.append(f'{name}: no wanted leaf matches {rule.source!r}')
    elif not scope - self.leaves.keys():
      self.faults.append(
        f'{name}: the checkpoint has all of {rule.source!r}; drop it first'
      )
    self._new |= scope - self.leaves.keys()

  def carry(
    self, rule: Optimizer, target: Mapping[str, Any], name: str
  ) -> None:
    """Replaces the state of the optimizer by that of the wanted one."""
    made, faults = remap_optimizer.carry(rule, self.leaves, target)
    self.faults += [f'{name}: {fault}' for fault in faults]
    if not made:
      self.faults.append(f'{name}: the wanted state has no opt_state')
    used = {id(s) for leaf in made.values() if leaf for s in _stored(leaf)}
    for full in [n for n in self.leaves if n.startswith(remap_optimizer.STATE)]:
      leaf = self.leaves.pop(full)
      if not used.issuperset(id(s) for s in _stored(leaf)):
        self.dropped.append((leaf, name))
    for full, leaf in made.items():
      if leaf is None:
        self._new.add(full)
      else:
        self.leaves[full] = leaf
    self.lost.append('opt_state')

  def fit(self, target: Mapping[str, Any] | None) -> None:
    """Compares what came out to what is wanted."""
    if target is None:
      return
    lacks = target.keys() - self.leaves.keys() - self._new - self._failed
    if lacks:
      self.faults.append(f'lacks {_some(lacks, target)}')
    if extra := self.leaves.keys() - target.keys():
      here = {name: self.leaves[name].view for name in extra}
      self.faults.append(f'has left over {_some(extra, here)}')
    for name in sorted(self.leaves.keys() & target.keys()):
      have, want = self.leaves[name].view, target[name]
      if not hasattr(want, 'dtype'):
        continue
      if tuple(have.shape) != tuple(want.shape):
        self.faults.append(
          f'{name} has shape {tuple(have.shape)}, wanted {tuple(want.shape)}'
        )
      elif have.dtype != want.dtype:
        self.faults.append(f'{name} is {have.dtype}, wanted {want.dtype}')

  def _scopes(self, rule):
    """`{prefix: {own name: leaf}}`; of the whole state for a '/...'."""
    source = rule.source if isinstance(rule.source, str) else rule.source[0]
    if source.startswith(_ROOT):
      return {_ROOT: {_ROOT + n: leaf for n, leaf in self.leaves.items()}}
    scopes: dict[str, dict[str, Leaf]] = {}
    shapes = {name: leaf.view for name, leaf in self.leaves.items()}
    for full, (prefix, own) in remap_names.mirrors(shapes).items():
      param = shapes[f'{remap_names.PARAMS}/{own}']
      if not isinstance(rule, Cast) or shapes[full].dtype == param.dtype:
        scopes.setdefault(f'{prefix}/', {})[own] = self.leaves[full]
    return scopes

  def _take(self, prefix, change, name):
    for own in change.taken:
      full = _full(prefix, own)
      leaf = self.leaves.pop(full, None)
      if leaf is None:
        self.faults.append(f'{name}: takes {full} twice')
        continue
      if not change.made:
        self.dropped.append((leaf, name))
      is_float = jnp.issubdtype(leaf.view.dtype, jnp.floating)
      is_moment = prefix.startswith(remap_optimizer.STATE)
      if is_moment and not is_float and not change.is_move:
        # Their scales belong to rows of the last dimension.
        self.faults.append(
          f'{name}: {full} holds codes ({leaf.view.dtype}), which can only be '
          'renamed or dropped'
        )
      if change.undo is None:
        self.lost.append(full)

  def _put(self, prefix, change, name):
    if change.fault:
      where = '' if prefix == _ROOT else prefix
      self.faults.append(f'{name}: {where}{change.fault}')
      self._failed |= {_full(prefix, own) for own in change.made}
      return
    for own, leaf in change.made.items():
      full = _full(prefix, own)
      if full in self.leaves:
        first = self._writers.get(full, 'the checkpoint')
        self.faults.append(f'{name}: writes {full}, which {first} has written')
      self.leaves[full] = leaf
      self._writers[full] = name
    if change.undo is not None:
      self.undo.append(change.undo('' if prefix == _ROOT else _ROOT + prefix))


def _full(prefix, own):
  return own.removeprefix(_ROOT) if prefix == _ROOT else prefix + own


def _stored(leaf):
  return views.sources(leaf.view)


def _some(names, leaves: Mapping[str, Any]) -> str:
  names: Sequence[str] = sorted(names)
  shown = [
    f'{n} {tuple(getattr(leaves[n], "shape", ()))}' for n in names[:_SHOWN]
  ]
  more = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
  return ', '.join(shown) + more
