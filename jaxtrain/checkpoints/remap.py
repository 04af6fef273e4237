"""From one checkpoint to another tree: the plan, and its execution.

After Universal Checkpointing (Lian et al., https://arxiv.org/abs/2406.18820);
`remap_rules` says what a rule is, and how this differs. `plan` applies rules to
names and shapes and finds every fault before anything is read; `read` then
reads, for each device, what its shards of the result are made of.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any

import jax
import numpy as np

from jaxtrain.checkpoints import abstract
from jaxtrain.checkpoints import remap_language
from jaxtrain.checkpoints import views
from jaxtrain.checkpoints.remap_language import Init
from jaxtrain.checkpoints.remap_language import Optimizer
from jaxtrain.checkpoints.remap_tree import Tree
from jaxtrain.sharding.partition import path_name


@dataclasses.dataclass(frozen=True)
class Row:
  """One leaf of the result, or one that is left out.

  Attributes:
    target: Name in the result; '' for a leaf of the checkpoint without one.
    view: What to read; `None` where it comes from the new state.
    how: What is done, in words.
    shape: Of the result.
    dtype: Of the result.
  """

  target: str
  view: views.View | None
  how: tuple[str, ...]
  shape: tuple[int, ...]
  dtype: Any

  @property
  def sources(self) -> list[views.Stored]:
    """Leaves of the checkpoint that it is made of."""
    return views.sources(self.view) if self.view else []

  @property
  def num_bytes(self) -> int:
    """Size of the result, of all processes together."""
    if not self.target:
      return 0
    return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Plan:
  """What would happen; nothing has been read.

  Attributes:
    where: The checkpoint.
    rows: One for each leaf of the result, then one for each left out.
    undo: Rules that make the checkpoint of the result again.
    lost: Names that they do not bring back.
  """

  where: str
  rows: tuple[Row, ...]
  undo: tuple[dict[str, Any], ...]
  lost: tuple[str, ...]

  def inverse(self) -> list[dict[str, Any]]:
    """The rules that make the checkpoint of the result, bit for bit.

    Raises:
      ValueError: Names what was dropped, cut or rounded.
    """
    if self.lost:
      raise ValueError(f'cannot be undone: {", ".join(self.lost)}')
    return list(self.undo)

  def table(self) -> str:
    """The rows as text, under a line for the whole."""
    made = [r for r in self.rows if r.target]
    total = sum(r.num_bytes for r in made)
    new = sum(not r.view for r in made)
    lines = [
      f'{self.where}: {len(made)} leaves, {total:,} bytes; {new} of them new, '
      f'{len(self.rows) - len(made)} left out'
    ]
    cells = [('target', 'from', 'what', 'was', 'becomes', 'bytes')]
    cells += [_cells(row) for row in self.rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
      padded = [c.ljust(w) for c, w in zip(row[:-1], widths, strict=False)]
      lines.append('  '.join((*padded, row[-1].rjust(widths[-1]))))
    return '\n'.join(lines)


def plan(
  leaves: Mapping[str, views.View],
  rules: Sequence[Mapping[str, Any]],
  target: Any = None,
  where: str = 'the checkpoint',
) -> Plan:
  """Applies rules to the names and shapes of a checkpoint. Reads nothing.

  Args:
    leaves: Of the checkpoint, by '/'-joined path (`stored.open_checkpoint`).
    rules: See `remap_rules`; applied one after the other.
    target: Tree of the arrays or `ShapeDtypeStruct`s that are wanted; `None`
      takes whatever comes out.
    where: What errors call the checkpoint.

  Raises:
    ValueError: All at once: rules that make no sense or match nothing, two that
      write one leaf, shapes or dtypes that do not come out, leaves that are
      missing or left over.
  """
  parsed = remap_language.parse(rules)
  wanted = None
  if target is not None:
    wanted = abstract.leaves(abstract.restorable(target)[0])
  tree = Tree(leaves)
  for number, rule in enumerate(parsed, 1):
    name = f'rule {number} ({rules[number - 1]["rule"]})'
    if isinstance(rule, Init | Optimizer):
      if wanted is None:
        tree.faults.append(f'{name} needs a target state')
      elif isinstance(rule, Optimizer):
        tree.carry(rule, wanted, name)
      else:
        tree.init(rule, wanted, name)
    else:
      tree.apply(rule, name)
  tree.fit(wanted)
  if tree.faults:
    raise ValueError(
      f'{where} does not become what is wanted:\n  ' + '\n  '.join(tree.faults)
    )
  rows = [
    _row(name, tree.leaves.get(name), (wanted or {}).get(name))
    for name in wanted or tree.leaves
  ]
  for leaf, name in tree.dropped:
    how, view = (*leaf.how, f'left out by {name}'), leaf.view
    rows.append(Row('', view, how, view.shape, view.dtype))
  return Plan(where, tuple(rows), tuple(reversed(tree.undo)), tuple(tree.lost))


def read(
  plan: Plan,
  target: Any,
  new: Any = None,
  on_read: Callable[[int], None] = lambda num_bytes: None,
) -> Any:
  """Reads what a plan says onto the shardings of `target`.

  Every shard of this process is read by itself, one leaf at a time; replicas
  are read once.

  Args:
    plan: Made for `target`.
    target: Tree of `ShapeDtypeStruct`s or arrays; random keys are allowed. A
      leaf without sharding comes back as a NumPy array.
    new: Tree like it, where the plan's new leaves come from.
    on_read: Called with the bytes that this process has of another shard.

  Returns:
    Tree like `target`.

  Raises:
    ValueError: The checkpoint is damaged, or new leaves are wanted of no state.
  """
  wanted, finish = abstract.restorable(target)
  rows = {row.target: row for row in plan.rows}
  fresh = {} if new is None else abstract.leaves(abstract.without_keys(new))

  def one(path, leaf):
    name = path_name(path)
    row = rows[name]
    if row.view is not None:
      return _place(row.view, leaf, on_read)
    if name not in fresh:
      raise ValueError(f'{name} is new, and there is no state to take it from')
    return fresh[name]

  return finish(jax.tree_util.tree_map_with_path(one, wanted))


def _row(name, leaf, want):
  if leaf is not None:
    return Row(name, leaf.view, leaf.how, leaf.view.shape, leaf.view.dtype)
  dtype = want.dtype if hasattr(want, 'dtype') else np.result_type(want)
  return Row(name, None, ('new',), tuple(getattr(want, 'shape', ())), dtype)


def _place(view, leaf, on_read):
  sharding = getattr(leaf, 'sharding', None)
  done = {}

  def shard(index):
    index = tuple(
      slice(*s.indices(size)[:2])
      for s, size in zip(index, view.shape, strict=True)
    )
    key = tuple((s.start, s.stop) for s in index)
    if key not in done:
      done[key] = view.read(index)
      on_read(done[key].nbytes)
    return done[key]

  if sharding is not None:
    return jax.make_array_from_callback(view.shape, sharding, shard)
  array = shard(views.whole(view.shape))
  return array if hasattr(leaf, 'dtype') else type(leaf)(array[()])


def _cells(row):
  sources = row.sources
  names = [s.name for s in sources]
  shown = names[0] if names else '-'
  if len(names) > 1:
    shown += f' and {len(names) - 1} more'
  was = '-'
  if sources:
    was = f'{sources[0].dtype}{list(sources[0].shape)}'
  becomes = f'{row.dtype}{list(row.shape)}' if row.target else '-'
  what = ', '.join(row.how) or 'as it is'
  return row.target or '-', shown, what, was, becomes, f'{row.num_bytes:,}'
