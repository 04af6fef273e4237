"""One folder of orbax checkpoints: names, opening, reading, what went wrong.

A checkpoint of step 1200 is the folder `00001200` with the items `state` (the
arrays, in shards), `meta` (model config and free metadata, JSON) and `data`
(the data iterator of each process, JSON). It is written under another name and
renamed when whole, so a process may be killed at any time.
"""

from collections.abc import Callable, Iterator
import contextlib
import json
import os
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxtrain.checkpoints import abstract
from jaxtrain.checkpoints import file_list

_UNFINISHED = '.orbax-checkpoint-tmp'
_NAMES = ocp.path.step.standard_name_format(step_format_fixed_length=8)


def open_folder(
  directory: str | os.PathLike,
  *,
  create: bool,
  keep: int | None = None,
  on_written: Callable[[], None] | None = None,
  state_handler: ocp.PyTreeCheckpointHandler | None = None,
) -> ocp.CheckpointManager:
  """Opens the folder that holds the checkpoints of a run.

  Args:
    directory: The folder.
    create: Whether to make it if it is not there.
    keep: How many of the newest to keep; `None` keeps all.
    on_written: Called when a checkpoint is written, before its final name.
    state_handler: What writes `state`, on another thread than the one that
      starts programs; `None` is orbax's own.

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
  registry.add('state', ocp.args.PyTreeSave, state_handler)
  registry.add('state', ocp.args.PyTreeRestore)
  registry.add('meta', ocp.args.JsonSave)
  registry.add('meta', ocp.args.JsonRestore)
  registry.add('data', ocp.args.JsonSave, per_process)
  multiprocessing = ocp.options.MultiprocessingOptions()
  if state_handler is not None and jax.process_count() > 1:
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
    preservation_policy=ocp.checkpoint_managers.LatestN(keep),
    async_options=ocp.AsyncOptions(
      post_finalization_callback=on_written,
      # Otherwise a folder that cannot be made is an error after five minutes.
      create_directories_asynchronously=state_handler is None,
    ),
  )
  return ocp.CheckpointManager(
    directory, options=options, handler_registry=registry
  )


def unfinished(
  manager: ocp.CheckpointManager, step: int | None = None
) -> list[Any]:
  """Folders of checkpoints being written, or that were when a run died."""
  name = '*' if step is None else _NAMES.build_name(step)
  return list(manager.directory.glob(f'{name}{_UNFINISHED}*'))


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


def read_data_state(manager: ocp.CheckpointManager, step: int) -> Any:
  """The data state of this process at a step.

  Raises:
    ValueError: It was saved by another number of processes, whose states
      differ.
  """
  with _reading(manager, step):
    folder = _folder(manager, step) / 'data'
    own = folder / _data_file(jax.process_index(), jax.process_count())
    if own.exists():
      return json.loads(own.read_text())
    files = sorted(folder.glob('process_*'))
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


@contextlib.contextmanager
def _reading(manager, step) -> Iterator[None]:
  """Errors of the files, which are many, become one that says what to do."""
  try:
    file_list.check(_folder(manager, step))
    yield
  except Exception as e:
    if 'RESOURCE_EXHAUSTED' in str(e):  # Out of device memory.
      raise
    reason = str(e).strip().partition('\n')[0][:300]
    kind = '' if type(e) is ValueError else f'{type(e).__name__}: '
    raise ValueError(
      f'{_where(manager, step)} is damaged ({kind}{reason}); '
      f'{_instead(sorted(manager.all_steps()), step)}'
    ) from e


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
