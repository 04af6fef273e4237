"""The state of one optimizer made of that of another, by what leaves mean."""

from collections.abc import Mapping
from typing import Any

from jaxtrain.checkpoints import remap_names
from jaxtrain.checkpoints import views
from jaxtrain.checkpoints.remap_language import Optimizer
from jaxtrain.checkpoints.remap_rules import Leaf

STATE = 'opt_state/'
_COUNT = 'count'


def carry(
  rule: Optimizer, leaves: Mapping[str, Leaf], target: Mapping[str, Any]
) -> tuple[dict[str, Leaf | None], list[str]]:
  """Which leaf of the checkpoint each leaf of the new optimizer comes from.

  A moment comes from that of the same name, or as the rule says, of the same
  parameter. A number of updates comes from beside the moments that were
  carried; where it stands alone (a schedule's), from one that stands alone, or
  from any.

  Args:
    rule: Which moments are carried.
    leaves: Of the checkpoint, after the rules before this one.
    target: Shapes of the wanted state, by name.

  Returns:
    For each wanted leaf under 'opt_state/' where it comes from, `None` for a
    new one, and faults.
  """
  old = _moments({name: leaf.view for name, leaf in leaves.items()})
  new = _moments(target)
  by_meaning: dict[tuple[str, str], list[str]] = {}
  for name, meaning in old.items():
    by_meaning.setdefault(meaning, []).append(name)
  made, faults, origin = {}, [], {}
  for name, (role, param) in new.items():
    source, factor = rule.carry.get(role, (role, 1.0)) or ('', 1.0)
    found = by_meaning.get((source, param), [])
    found = [name] if name in found else found
    if len(found) > 1:
      faults.append(f'{name} may come from {", ".join(found)}')
    made[name] = None
    if len(found) == 1:
      leaf = leaves[found[0]]
      if factor != 1.0:
        leaf = leaf.then(views.scale(leaf.view, factor), f'times {factor:g}')
      made[name] = leaf.then(leaf.view, f'{source} carried')
      origin[_beside(name, param)] = _beside(found[0], param)
  wanted = {n: x for n, x in target.items() if n.startswith(STATE)}
  counts = _counts(leaves, old)
  for name, leaf in wanted.items():
    if name not in made:
      made[name] = _count(name, leaf, new, origin, leaves, counts)
  return made, faults


def _moments(leaves):
  """`{name: (role, parameter)}` of what mirrors parameters."""
  return {
    name: (prefix.rpartition('/')[2], param)
    for name, (prefix, param) in remap_names.mirrors(leaves).items()
    if name.startswith(STATE)
  }


def _beside(name, param):
  """Where a moment's state lies: 'opt_state/0' for 'opt_state/0/mu/...'."""
  return name.removesuffix(f'/{param}').rpartition('/')[0]


def _counts(leaves, moments):
  """Numbers of updates by the state they lie in, and which stand alone."""
  owners = {_beside(name, param) for name, (_, param) in moments.items()}
  found = {
    name.rpartition('/')[0]: name
    for name in leaves
    if name.startswith(STATE) and name.rpartition('/')[2] == _COUNT
  }
  return found, [place for place in found if place not in owners]


def _count(name, leaf, moments, origin, leaves, counts):
  """Where a number of updates comes from, if `name` is one."""
  by_place, alone = counts
  place, _, last = name.rpartition('/')
  if last != _COUNT or not by_place:
    return None
  if any(_beside(n, param) == place for n, (_, param) in moments.items()):
    source = origin.get(place)  # New moments are counted anew.
    if source not in by_place:
      return None
  else:
    choice = alone or list(by_place)
    source = place if place in choice else choice[0]
  found = leaves[by_place[source]]
  view = found.view
  if view.shape == () and len(getattr(leaf, 'shape', ())) == 1:
    view = views.repeat(view, leaf.shape[0])
  elif len(view.shape) == 1 and view.shape[0] and leaf.shape == ():
    view = views.reshape(views.cut(view, 0, 0, 1), ())
  return found.then(view, f'count of {source}')
