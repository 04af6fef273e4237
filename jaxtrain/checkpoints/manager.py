"""Training checkpoints on orbax.

Saved while training goes on, restored on any mesh, and read by serving without
the optimizer. `orbax_io.py` says what is in the folder.
"""

import functools
import json
import logging
import os
from typing import Any

import jax
from jax.sharding import Mesh
import orbax.checkpoint as ocp

from jaxtrain.checkpoints import abstract
from jaxtrain.checkpoints import file_list
from jaxtrain.checkpoints import lazy
from jaxtrain.checkpoints import orbax_io
from jaxtrain.models import config_json
from jaxtrain.models.config import ModelConfig
from jaxtrain.sharding import ShardingRules

_log = logging.getLogger(__name__)
SAVING = ('async', 'lazy')


class CheckpointManager:
  """Saves and restores the checkpoints of one run. Call from every process.

  Args:
    directory: Folder of the run's checkpoints; made if it is not there.
    keep: How many of the newest to keep; `None` keeps all.
    save_every_steps: `save` skips steps that are not a multiple of this.
    saving: 'async' copies the state before `save` returns, 'lazy' while the
      next steps run (`lazy.py`).
    staging_gib: Host memory for lazy copies, see `lazy.LazyWriter`.

  Raises:
    ValueError: `keep` or `save_every_steps` below 1, an unknown `saving`, or
      `staging_gib` not positive or without 'lazy'.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    keep: int | None = 3,
    save_every_steps: int = 1,
    saving: str = 'async',
    staging_gib: float | None = None,
  ):
    sizes = dict(keep=keep, save_every_steps=save_every_steps)
    for name, value in sizes.items():
      if value is not None and value < 1:
        raise ValueError(f'{name}={value} must be at least 1')
    check_saving(saving, staging_gib)
    self._lazy = lazy.LazyWriter(staging_gib) if saving == 'lazy' else None
    self._every = save_every_steps
    self._saved: set[int] = set()
    self._last: int | None = None  # The step being written, or written last.
    self._manager = orbax_io.open_folder(
      directory,
      create=True,
      keep=keep,
      on_written=self._list_files,
      state_handler=self._lazy and self._lazy.handler(),
    )

  def should_save(self, step: int) -> bool:
    """Whether `save(step, ...)` would save without `force`."""
    return step % self._every == 0 and step not in self._saved

  def save(
    self,
    step: int,
    state: Any,
    *,
    data_state: Any = None,
    config: ModelConfig | None = None,
    metadata: dict[str, Any] | None = None,
    force: bool = False,
    valid: jax.Array | None = None,
  ) -> bool:
    """Starts to save; waits only for the copy off the devices.

    The arrays may be donated as soon as this returns, or, if saving is lazy,
    after `wait_copied`. A checkpoint of the same step left by an earlier run is
    replaced.

    Args:
      step: Number of the step, not negative.
      state: Pytree of arrays (random keys too), with the parameters under
        'params'. With several processes its arrays must be global.
      data_state: Where this process's data iterator stands, as JSON types.
      config: Architecture, for `restore_params`.
      metadata: Anything else, as JSON types.
      force: Save whether or not `save_every_steps` divides `step`.
      valid: Scalar on the devices, 0 if nothing is to be saved. Not waited for
        if saving is lazy.

    Returns:
      Whether it saved: not if it is not the time for it, or if this manager has
      saved the step already.

    Raises:
      ValueError: A negative step, something that is not JSON, an array of one
        process only, or one that is too large for the staging memory.
      Exception: What stopped the previous save in the background.
    """
    if step < 0:
      raise ValueError(f'step={step} is negative')
    if step in self._saved or not (force or self.should_save(step)):
      return False
    meta = {
      'config': None if config is None else config_json.to_json(config),
      'metadata': metadata or {},
    }
    _check_json('metadata', meta)
    _check_json('data_state', data_state)
    state = abstract.without_keys(state)
    write = functools.partial(
      self._write,
      step,
      first=not self._saved,
      meta=ocp.args.JsonSave(meta),
      data=ocp.args.JsonSave(data_state),
    )
    if self._lazy is None:
      self.wait()
      if valid is not None and not int(valid):
        return False
      write(state)
      self._saved.add(step)
      return True
    self._saved.add(step)
    give_up = functools.partial(self._saved.discard, step)
    try:
      self._lazy.save(state, write, valid=valid, given_up=give_up)
    except Exception:
      give_up()
      raise
    return True

  def restore(
    self, abstract_state: Any, step: int | None = None
  ) -> tuple[Any, Any, dict[str, Any]]:
    """Reads a checkpoint onto the shardings of `abstract_state`.

    These need not be those it was saved with, nor on as many devices.

    Args:
      abstract_state: Pytree like the saved one, of arrays or
        `jax.ShapeDtypeStruct`s with shardings. A leaf without sharding comes
        back as a NumPy array.
      step: Which; `None` is the latest.

    Returns:
      The state, this process's data state, and the metadata.

    Raises:
      ValueError: No such checkpoint, an unfinished or damaged one (what to use
        instead is named), a state that it does not fit, or the data states of
        another number of processes that differ among each other.
    """
    self.wait()
    step = orbax_io.pick(self._manager, step)
    state = orbax_io.read_state(self._manager, step, abstract_state)
    data_state = orbax_io.read_data_state(self._manager, step)
    metadata = orbax_io.read_meta(self._manager, step)['metadata']
    return state, data_state, metadata

  def latest_step(self) -> int | None:
    """Step of the newest whole checkpoint, or `None`."""
    return max(self._manager.all_steps(), default=None)

  def all_steps(self) -> list[int]:
    """Steps of all whole checkpoints, oldest first."""
    return sorted(self._manager.all_steps())

  def wait_copied(self) -> None:
    """Waits until the arrays of the last save may be donated."""
    if self._lazy is not None:
      self._lazy.wait_copied()

  @property
  def blocked_s(self) -> float:
    """Seconds that lazy saves have kept their caller waiting so far."""
    return self._lazy.blocked_s if self._lazy is not None else 0.0

  def wait(self) -> None:
    """Waits until everything is on disk; raises what went wrong."""
    if self._lazy is not None:
      self._lazy.wait()
    self._finish()

  def _finish(self):
    try:
      self._manager.wait_until_finished()
    except BaseException:
      self._saved.discard(self._last)
      self._manager.reload()
      raise

  def close(self) -> None:
    """Waits, then frees threads. The manager is of no more use.

    Raises:
      Exception: What stopped a save in the background.
    """
    try:
      if self._lazy is not None:
        self._lazy.wait()
    finally:
      self._manager.close()

  def __enter__(self) -> 'CheckpointManager':
    return self

  def __exit__(self, *error) -> None:
    self.close()

  def _write(self, step, state, *, first, meta, data):
    """Gives a state to orbax; on the thread of lazy saves, to the end."""
    self._make_room(step, first)
    self._last = step
    items = ocp.args.Composite(
      state=ocp.args.PyTreeSave(state), meta=meta, data=data
    )
    self._manager.save(step, args=items, force=True)
    if self._lazy is not None:
      self._finish()

  def _make_room(self, step, first):
    """Removes what a killed or earlier run has left in the way."""
    if first and jax.process_index() == 0:
      for path in orbax_io.unfinished(self._manager):
        _log.warning('Removing %s, which was never finished', path)
        path.rmtree()
    if step in self._manager.all_steps():
      _log.warning('Replacing step %d in %s', step, self._manager.directory)
      self._manager.delete(step)

  def _list_files(self):
    if jax.process_index() == 0:
      for folder in orbax_io.unfinished(self._manager, self._last):
        file_list.write(folder)


def read_config(
  directory: str | os.PathLike, step: int | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
  """Architecture and metadata of a checkpoint, without its arrays.

  Raises:
    ValueError: As `restore_params`.
  """
  with orbax_io.open_folder(directory, create=False) as manager:
    return _read_config(manager, orbax_io.pick(manager, step))


def restore_params(
  directory: str | os.PathLike,
  mesh: Mesh | None,
  rules: ShardingRules,
  step: int | None = None,
  param_dtype: Any = None,
) -> tuple[ModelConfig, Any]:
  """Reads the parameters of a training checkpoint, and nothing else of it.

  Args:
    directory: What `CheckpointManager` was given.
    mesh: Devices; `None` is the first local device.
    rules: Which axis goes where.
    step: Which; `None` is the latest.
    param_dtype: Dtype of the parameters; `None` keeps the stored ones.

  Returns:
    The architecture and the parameter tree of `Transformer(config)`.

  Raises:
    ValueError: No checkpoint there, one saved without a config, an unfinished
      or damaged one, or a dimension that the mesh does not divide.
  """
  with orbax_io.open_folder(directory, create=False) as manager:
    step = orbax_io.pick(manager, step)
    config, _ = _read_config(manager, step)
    wanted = {'params': abstract.sharded_params(config, mesh, rules)}
    if param_dtype is None:
      stored = orbax_io.stored_leaves(manager, step)
      wanted = abstract.with_stored_dtypes(wanted, stored)
    else:
      wanted = abstract.with_dtype(wanted, param_dtype)
    state = orbax_io.read_state(manager, step, wanted, partial=True)
  return config, state['params']


def _read_config(manager, step):
  meta = orbax_io.read_meta(manager, step)
  if meta['config'] is None:
    raise ValueError(
      f'checkpoint step {step} in {manager.directory} was saved without a '
      'model config'
    )
  return config_json.from_json(meta['config']), meta['metadata']


def _check_json(name, value):
  try:
    json.dumps(value)
  except (TypeError, ValueError) as e:
    raise ValueError(f'{name} is not JSON: {e}') from e


def check_saving(saving: str, staging_gib: float | None) -> None:
  """Checks how to save.

  Raises:
    ValueError: See `CheckpointManager`.
  """
  if saving not in SAVING:
    raise ValueError(
      f'saving={saving!r} is not known; allowed: {", ".join(SAVING)}'
    )
  if staging_gib is not None and saving != 'lazy':
    raise ValueError(
      f"staging_gib={staging_gib} is of saving='lazy', not of {saving!r}"
    )
