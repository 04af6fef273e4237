"""One folder of orbax checkpoints: names, opening, reading, what went wrong.

A checkpoint of step 1200 is the folder `00001200` with the items `state` (the
arrays, in shards), `meta` (model config and free metadata, JSON) and `data`
(the data iterator of each process, JSON). It is written under another name and
renamed when whole, so a process may be killed at any time.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import json
import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxtrain.checkpoints import abstract
from jaxtrain.checkpoints import agreement
from jaxtrain.checkpoints import file_list
from jaxtrain.checkpoints import removal
from jaxtrain.checkpoints.checked_handler import CheckedHandler
from jaxtrain.checkpoints.joint_save import JointSave

_UNFINISHED = '.orbax-checkpoint-tmp'
_NAMES = ocp.path.step.standard_name_format(step_format_fixed_length=8)
# Errors that say nothing of the files; the last is out of device memory.
_PASSING = (
  'PermissionError',
  'TimeoutError',
  'ConnectionError',
  'MemoryError',
  'RESOURCE_EXHAUSTED',
)


class DamagedError(ValueError):
  """A checkpoint's files are not what was written.

  Attributes:
    damage: What is wrong, without what to do.
  """

  def __init__(self, damage: str, advice: str = ''):
    super().__init__(f'{damage}; {advice}' if advice else damage)
    self.damage = damage


def open_folder(
  directory: str | os.PathLike,
  *,
  create: bool,
  policy: Any = None,
  on_written: Callable[[], None] | None = None,
  together: JointSave | None = None,
  in_background: Mapping[str, Any] | None = None,
) -> ocp.CheckpointManager:
  """Opens the folder that holds the checkpoints of a run.

  Args:
    directory: The folder.
    create: Whether to make it if it is not there.
    policy: What to keep, of orbax's `PreservationPolicy`; `None` keeps all.
    on_written: Called when a checkpoint is written, before its final name.
    together: How the processes learn of each other's failures.
    in_background: Options of orbax's handler of `state`, if it is saved from
      another thread than the one that starts programs.

  Returns:
    Orbax's manager.
  """
  directory = os.fspath(directory)
  if '://' not in directory:  # A bucket has no working directory.
    directory = os.path.abspath(directory)
  # One file per process, as each has an iterator of its own.
  per_process = ocp.JsonCheckpointHandler(
    filename=_data_file(jax.process_index(), jax.process_count()),
    multiprocessing_options=ocp.options.MultiprocessingOptions(
      primary_host=None
    ),
  )
  registry = ocp.DefaultCheckpointHandlerRegistry()
  arrays = CheckedHandler(
    together.fail if together else lambda error: None, **(in_background or {})
  )
  registry.add('state', ocp.args.PyTreeSave, arrays)
  registry.add('state', ocp.args.PyTreeRestore, arrays)
  registry.add('meta', ocp.args.JsonSave)
  registry.add('meta', ocp.args.JsonRestore)
  registry.add('data', ocp.args.JsonSave, per_process)
  multiprocessing = ocp.options.MultiprocessingOptions()
  if in_background is not None and jax.process_count() > 1:
    # With the processes named, barriers go through the coordination service;
    # otherwise they are programs of the devices. Orbax then makes no folder, so
    # another manager does, on this thread.
    multiprocessing.active_processes = set(range(jax.process_count()))
    if create:
      plain = ocp.CheckpointManagerOptions(save_root_metadata=False)
      ocp.CheckpointManager(directory, options=plain).close()
      create = False
  options = ocp.CheckpointManagerOptions(
    step_name_format=_NAMES,
    create=create,
    multiprocessing_options=multiprocessing,
    save_root_metadata=False,
    preservation_policy=policy or ocp.checkpoint_managers.LatestN(),
    async_options=ocp.AsyncOptions(
      post_finalization_callback=on_written,
      barrier_sync_fn=together.barrier if together else None,
      # Otherwise a folder that cannot be made is an error after five minutes.
      create_directories_asynchronously=in_background is None,
    ),
  )
  manager = ocp.CheckpointManager(
    directory, options=options, handler_registry=registry
  )
  # Orbax has no option for it; a version without it must not go unnoticed.
  assert hasattr(manager, '_checkpoint_deleter')
  manager._checkpoint_deleter = removal.Deleter(
    manager.directory, _NAMES.build_name
  )
  return manager


def unfinished(
  manager: ocp.CheckpointManager, step: int | None = None
) -> list[Any]:
  """Folders of checkpoints being written, or that were when a run died."""
  name = '*' if step is None else _NAMES.build_name(step)
  return list(manager.directory.glob(f'{name}{_UNFINISHED}*'))


def leftovers(manager: ocp.CheckpointManager) -> list[Any]:
  """Folders that are no checkpoints: never finished, or half deleted."""
  deleted = [
    path
    for path in manager.directory.iterdir()
    if removal.is_leftover(path.name)
  ]
  return unfinished(manager) + deleted


def set_aside(manager: ocp.CheckpointManager, step: int) -> pathlib.Path:
  """Renames a damaged checkpoint, so that it counts no more; the new name."""
  return removal.set_aside(_folder(manager, step))


def pick(manager: ocp.CheckpointManager, step: int | None) -> int:
  """The step to read: `step`, or the latest if `None`.

  Raises:
    ValueError: There is none, or it is unfinished.
  """
  steps = sorted(manager.all_steps())
  if step is None:
    if steps:
      return steps[-1]
    raise ValueError(f'no checkpoint in {manager.directory}')
  if step in steps:
    return step
  what = 'does not exist'
  if found := unfinished(manager, step):
    what = (
      'was never finished (its process was stopped while it wrote '
      f'{found[0].name})'
    )
  raise ValueError(f'{_where(manager, step)} {what}; {_instead(steps, step)}')


def read_state(
  manager: ocp.CheckpointManager,
  step: int,
  abstract_state: Any,
  partial: bool = False,
) -> Any:
  """Reads the arrays of a step onto the shardings of `abstract_state`.

  Args:
    manager: Of the folder.
    step: Which.
    abstract_state: Tree of arrays or `ShapeDtypeStruct`s.
    partial: Read only what the tree names, cast to its dtypes.

  Raises:
    ValueError: The checkpoint does not fit the tree, or is damaged.
  """
  wanted, finish = abstract.restorable(abstract_state)
  stored = stored_leaves(manager, step)
  abstract.check(wanted, stored, _where(manager, step), partial)
  args = ocp.args.PyTreeRestore(
    wanted,
    restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
    partial_restore=partial,
  )
  with _reading(manager, step):
    return finish(manager.restore(step, args=_only(state=args))['state'])


def stored_tree(manager: ocp.CheckpointManager, step: int) -> Any:
  """What a step says of its state: dicts and lists of shapes and dtypes."""
  with _reading(manager, step):
    return manager.item_metadata(step)['state'].tree


def stored_leaves(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
  """`{'/'-joined path: its shape and dtype}` of what a step holds."""
  return abstract.leaves(stored_tree(manager, step))


def read_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
  """The `meta` item of a step."""
  with _reading(manager, step):
    args = _only(meta=ocp.args.JsonRestore())
    return dict(manager.restore(step, args=args)['meta'])


def read_metrics(manager: ocp.CheckpointManager, step: int) -> dict[str, float]:
  """The metrics saved with a step; none if they are unreadable.

  What to keep depends on them, and that must not fail for a damaged file.
  """
  meta = pathlib.Path(_folder(manager, step)) / 'meta' / 'metadata'
  try:
    return {
      k: float(v) for k, v in json.loads(meta.read_text())['metrics'].items()
    }
  except (AttributeError, KeyError, OSError, TypeError, ValueError):
    return {}


def read_data_state(manager: ocp.CheckpointManager, step: int) -> Any:
  """The data state of this process at a step.

  Raises:
    ValueError: It was saved by another number of processes, whose states
      differ.
  """
  with _reading(manager, step):
    folder = _folder(manager, step) / 'data'
    own = folder / _data_file(jax.process_index(), jax.process_count())
    files = [own] if own.exists() else sorted(folder.glob('process_*'))
    states = [json.loads(p.read_text()) for p in files]
    if not states:
      raise ValueError('no data state')
  # Iterators over one global order all stand at the same place.
  if any(s != states[0] for s in states):
    raise ValueError(
      f'{_where(manager, step)} has the data states of {len(states)} '
      f'processes, which differ, and there are {jax.process_count()} now'
    )
  return states[0]


def check_files(
  manager: ocp.CheckpointManager,
  step: int,
  verify: bool = True,
  arrays: Callable[[str], bool] = lambda name: True,
  progress: Callable[[int], object] = lambda num_bytes: None,
) -> int:
  """Compares the files of a step to what was written. Call everywhere.

  Args:
    manager: Of the folder.
    step: Which.
    verify: Whether to read contents, too, and compare checksums.
    arrays: Which arrays matter, by name.
    progress: Called with numbers of bytes read.

  Returns:
    Number of bytes whose checksums this process compared.

  Raises:
    DamagedError: Names files and arrays. All processes raise the same.
  """
  folder = pathlib.Path(_folder(manager, step))
  pieces = []
  with _reading(manager, step):
    listed = file_list.read(folder)
    if listed is None and _must_have_list(manager, step):
      raise ValueError(f'{file_list.NAME} is missing')
    if listed is not None:
      file_list.check_sizes(folder, listed)
      if verify:
        pieces = _to_verify(listed.pieces, arrays)
      faults = file_list.damage(folder, pieces, listed.grids, progress)
      if faults:
        raise ValueError(file_list.join(faults))
  return sum(p.span.size for p in pieces)


def listed_bytes(manager: ocp.CheckpointManager, step: int) -> int | None:
  """Bytes of the listed files of a step, `None` without a readable list."""
  try:
    listed = file_list.read(pathlib.Path(_folder(manager, step)))
  except ValueError:
    return None
  return None if listed is None else sum(listed.sizes.values())


def _to_verify(pieces, arrays):
  """What this process reads of the pieces that matter."""
  matter = [p for p in pieces if p.span.array is None or arrays(p.span.array)]
  return file_list.share(matter, jax.process_index(), jax.process_count())


def _must_have_list(manager, step):
  """Whether a checkpoint without a list of its files had one once."""
  meta = pathlib.Path(_folder(manager, step)) / 'meta' / 'metadata'
  return meta.exists() and bool(json.loads(meta.read_text()).get('listed'))


@contextlib.contextmanager
def _reading(manager, step) -> Iterator[None]:
  """Errors of the files, which are many, become one that says what to do.

  If one process has one, all raise it.
  """
  error = None
  try:
    yield
  except Exception as e:
    error = e
  reason = agreement.first_error('reading', error)
  if reason is None:
    return
  if any(name in reason for name in _PASSING):
    raise error or RuntimeError(f'{_where(manager, step)}: {reason}')
  raise DamagedError(
    f'{_where(manager, step)} is damaged ({reason})',
    _instead(sorted(manager.all_steps()), step),
  ) from error


def _only(**items):
  return ocp.args.Composite(**items)


def _folder(manager, step):
  return manager.directory / _NAMES.build_name(step)


def _where(manager, step):
  return f'checkpoint step {step} in {manager.directory}'


def _instead(steps, bad):
  others = [str(s) for s in reversed(steps) if s != bad]
  return f'use step {" or ".join(others)}' if others else 'there is no other'


def _data_file(index, count):
  return f'process_{index}-of-{count}.json'
