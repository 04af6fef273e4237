"""Writes what a plan makes of one checkpoint as another, and starts from it."""

from collections.abc import Callable, Mapping, Sequence
import os
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.checkpoints import abstract
from jaxtrain.checkpoints import remap
from jaxtrain.checkpoints import remap_names
from jaxtrain.checkpoints import stored
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.models.config import ModelConfig
from jaxtrain.sharding import ShardingRules

_GONE = object()


def restore(
  directory: str | os.PathLike,
  rules: Sequence[Mapping[str, Any]],
  target: Any,
  new: Callable[[], Any] | None = None,
  step: int | None = None,
) -> Any:
  """Reads a checkpoint of another tree onto the shardings of `target`.

  Args:
    directory: What `CheckpointManager` was given.
    rules: See `remap_rules`.
    target: Tree of arrays or `ShapeDtypeStruct`s.
    new: Makes a tree like it, for leaves that rules leave to it; called only if
      there are some.
    step: Which; `None` is the latest.

  Raises:
    ValueError: As `stored.open_checkpoint`, `remap.plan` and `remap.read`.
  """
  with stored.open_checkpoint(directory, step) as checkpoint:
    plan = remap.plan(checkpoint.leaves, rules, target, checkpoint.where)
    fresh = None
    if new is not None and any(row.view is None for row in plan.rows):
      fresh = new()
    return remap.read(plan, target, fresh)


def begin(
  directory: str | os.PathLike,
  source: str | os.PathLike,
  rules: Sequence[Mapping[str, Any]],
  target: Any,
  new: Callable[[], Any],
  *,
  step: int | None = None,
  data_state: Any,
  config: ModelConfig,
  metadata: dict[str, Any],
) -> bool:
  """Makes another run's checkpoint the first one of a run that has none.

  A run that is interrupted before it has saved anything thus finds it, too.

  Args:
    directory: Checkpoints of the run.
    source: Those of the other run.
    rules: See `restore`.
    target: See `restore`; has a 'step', which is the checkpoint's number.
    new: See `restore`.
    step: Which of the other run's; `None` is the latest.
    data_state: See `CheckpointManager.save`.
    config: See `CheckpointManager.save`.
    metadata: See `CheckpointManager.save`.

  Returns:
    Whether it did: not if the run has a checkpoint.

  Raises:
    ValueError: As `restore`.
  """
  with CheckpointManager(directory, keep=None) as manager:
    if manager.latest_step() is not None:
      return False
    state = restore(source, rules, target, new, step)
    manager.save(
      int(state['step']),
      state,
      data_state=data_state,
      config=config,
      metadata=metadata,
      force=True,
    )
  return True


def target_of(
  checkpoint: stored.Checkpoint,
  plan: remap.Plan,
  mesh: Mesh,
  rules: ShardingRules,
  config: ModelConfig | None,
) -> Any:
  """The state that a plan without a target makes, and where it would lie.

  Containers are those of the checkpoint, where they are left. Parameters and
  what mirrors them are sharded as the model's, all else is replicated.

  Args:
    checkpoint: That of the plan.
    plan: Made without target.
    mesh: Devices.
    rules: Which axis goes where.
    config: Architecture of the result; `None`: nothing is known of it, and all
      is replicated.

  Returns:
    Tree of `ShapeDtypeStruct`s.

  Raises:
    ValueError: The parameters are not those of the architecture.
  """
  replicated = NamedSharding(mesh, P())
  leaves = {
    row.target: jax.ShapeDtypeStruct(row.shape, row.dtype, sharding=replicated)
    for row in plan.rows
    if row.target
  }
  if config is not None:
    params = abstract.leaves(
      {remap_names.PARAMS: abstract.sharded_params(config, mesh, rules)}
    )
    prefix = f'{remap_names.PARAMS}/'
    abstract.check(
      abstract.with_stored_dtypes(params, leaves),
      {n: x for n, x in leaves.items() if n.startswith(prefix)},
      'what the rules make',
    )
    for name, (_, own) in remap_names.mirrors(leaves).items():
      sharding = params[prefix + own].sharding
      leaves[name] = leaves[name].update(sharding=sharding)
  return _rebuilt(checkpoint.tree, leaves)


def write(
  checkpoint: stored.Checkpoint,
  plan: remap.Plan,
  target: Any,
  directory: str | os.PathLike,
  config: ModelConfig | None,
  *,
  data_state: Any = None,
  new: Any = None,
  on_read: Callable[[int], None] = lambda num_bytes: None,
) -> None:
  """Reads what a plan says and saves it, a checkpoint like any other.

  The result is held on the devices of `target` as a whole. The metadata are
  those of the checkpoint.

  Args:
    checkpoint: That of the plan.
    plan: What to do.
    target: Where the result lies meanwhile.
    directory: A folder that is not there, or empty.
    config: Architecture of the result.
    data_state: Of the result, mostly `checkpoint.read_data_state()`.
    new: See `remap.read`.
    on_read: See `remap.read`.

  Raises:
    ValueError: There is something in the folder, or as `remap.read`.
  """
  check_empty(directory)
  state = remap.read(plan, target, new, on_read)
  with CheckpointManager(directory, keep=None) as manager:
    manager.save(
      checkpoint.step,
      state,
      data_state=data_state,
      config=config,
      metadata=checkpoint.metadata,
      force=True,
    )


def check_empty(directory: str | os.PathLike) -> None:
  """Refuses to write into what is there.

  Raises:
    ValueError: It is a file or a folder that is not empty.
  """
  path = pathlib.Path(directory)
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise ValueError(f'{path} is there already; nothing is overwritten')


def _rebuilt(tree, leaves):
  """The containers of `tree` around `leaves`, which have paths for names."""
  rest = dict(leaves)

  def build(node, path):
    if isinstance(node, dict):
      kept = {k: build(x, (*path, str(k))) for k, x in node.items()}
      kept = {k: x for k, x in kept.items() if x is not _GONE}
      return kept if kept or not node else _GONE
    if isinstance(node, list | tuple):
      kept = [build(x, (*path, str(k))) for k, x in enumerate(node)]
      if node and all(x is _GONE for x in kept):
        return _GONE
      return [None if x is _GONE else x for x in kept]
    return None if node is None else rest.pop('/'.join(path), _GONE)

  root = build(tree, ())
  root = {} if root is _GONE else root
  for name, leaf in rest.items():
    *folders, last = name.split('/')
    node = root
    for word in folders:
      node = _entered(node, word)
    if isinstance(node, list):
      _entered(node, last)
      last = int(last)
    node[last] = leaf
  return root


def _entered(node, word):
  """The container of this name in another, made if it is not there."""
  if not isinstance(node, list):
    return node.setdefault(word, {})
  node += [None] * (int(word) + 1 - len(node))
  if node[int(word)] is None:
    node[int(word)] = {}
  return node[int(word)]
