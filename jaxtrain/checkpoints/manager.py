"""Training checkpoints on orbax.

Saved while training goes on, restored on any mesh, and read by serving without
the optimizer. `orbax_io.py` says what is in the folder.

What is restored is what was saved: every file has a checksum. A save that does
not end, for whatever reason, changes nothing: the checkpoint before it is the
latest.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import errno
import functools
import json
import logging
import os
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxtrain.checkpoints import abstract
from jaxtrain.checkpoints import agreement
from jaxtrain.checkpoints import disk_space
from jaxtrain.checkpoints import file_list
from jaxtrain.checkpoints import lazy
from jaxtrain.checkpoints import orbax_io
from jaxtrain.checkpoints import removal
from jaxtrain.checkpoints import retention
from jaxtrain.checkpoints.disk_space import NoSpaceError
from jaxtrain.checkpoints.disk_space import SaveError
from jaxtrain.checkpoints.joint_save import JointSave
from jaxtrain.checkpoints.orbax_io import DamagedError
from jaxtrain.checkpoints.read_params import read_config
from jaxtrain.checkpoints.read_params import restore_params
from jaxtrain.checkpoints.saver_lock import SaverLock
from jaxtrain.models import config_json
from jaxtrain.models.config import ModelConfig

__all__ = [
  'CheckpointManager',
  'DamagedError',
  'NoSpaceError',
  'Resumed',
  'SaveError',
  'read_config',
  'restore_params',
]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Resumed:
  """The newest whole checkpoint, read.

  Attributes:
    step: Its step.
    state: As `CheckpointManager.restore` gives it.
    data_state: Of this process.
    metadata: As saved.
    damaged: What was wrong with each newer one; they were renamed.
  """

  step: int
  state: Any
  data_state: Any
  metadata: dict[str, Any]
  damaged: list[str]


class CheckpointManager:
  """Saves and restores the checkpoints of one run. Call from every process.

  A checkpoint is kept if one of the three rules keeps it.

  Args:
    directory: Folder of the run's checkpoints; made if it is not there.
    keep: How many of the newest to keep; `None` keeps all.
    save_every_steps: `save` skips steps that are not a multiple of this.
    keep_every: Steps that are a multiple of this are kept for good.
    keep_best: Such as `('eval_loss', 'min', 1)`: the metric given to `save`,
      whether less or more of it is better, and how many of the best to keep. A
      checkpoint saved without that metric is never among the best.
    saving: 'async' copies the state before `save` returns, 'lazy' while the
      next steps run (`lazy.py`).
    staging_gib: Host memory for lazy copies, see `lazy.LazyWriter`.

  Raises:
    ValueError: `keep`, `save_every_steps` or `keep_every` below 1, a
      `keep_best` of another form, an unknown `saving`, or `staging_gib` not
      positive or without 'lazy'.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    keep: int | None = 3,
    save_every_steps: int = 1,
    keep_every: int | None = None,
    keep_best: Sequence | None = None,
    saving: str = 'async',
    staging_gib: float | None = None,
  ):
    if save_every_steps < 1:
      raise ValueError(
        f'save_every_steps={save_every_steps} must be at least 1'
      )
    lazy.check_saving(saving, staging_gib)
    self._lazy = lazy.LazyWriter(staging_gib) if saving == 'lazy' else None
    self._every = save_every_steps
    self._saved: set[int] = set()
    self._last: int | None = None  # The step being written, or written last.
    self._is_claimed = False
    self._is_clean = False  # Whether leftovers of others have been removed.
    self._metrics: dict[int, dict[str, float]] = {}
    self._together = JointSave()
    self._manager = orbax_io.open_folder(
      directory,
      create=True,
      together=self._together,
      policy=retention.policy(keep, keep_every, keep_best, self.metrics),
      on_written=self._list_files,
      in_background=self._lazy and self._lazy.options(),
    )
    self._is_bucket = '://' in str(self._manager.directory)
    self._lock = SaverLock(self._manager.directory)

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
    metrics: Mapping[str, float] | None = None,
    force: bool = False,
  ) -> bool:
    """Starts to save; waits only for the copy off the devices.

    The arrays may be donated as soon as this returns, or, if saving is lazy,
    after `wait_copied`. A checkpoint of the same step left by an earlier run is
    replaced. After an error training can go on, and the step can be saved
    again: nothing is left of it.

    Args:
      step: Number of the step, not negative.
      state: Pytree of arrays (random keys too), with the parameters under
        'params'. With several processes its arrays must be global.
      data_state: Where this process's data iterator stands, as JSON types.
      config: Architecture, for `restore_params`.
      metadata: Anything else, as JSON types.
      metrics: What was measured at this step, for `keep_best`.
      force: Save whether or not `save_every_steps` divides `step`.

    Returns:
      Whether it saved: not if it is not the time for it, or if this manager has
      saved the step already.

    Raises:
      ValueError: A negative step, something that is not JSON, an array of one
        process only or too large for the staging memory, or a folder that
        another run saves into.
      NoSpaceError: There is no room for it, or was not for the previous one.
      SaveError: What stopped the previous save in the background.
    """
    if step < 0:
      raise ValueError(f'step={step} is negative')
    if step in self._saved or not (force or self.should_save(step)):
      return False
    meta = {
      'config': None if config is None else config_json.to_json(config),
      'metadata': metadata or {},
      'metrics': {k: float(v) for k, v in (metrics or {}).items()},
      'listed': not self._is_bucket,
    }
    _check_json('metadata', meta)
    _check_json('data_state', data_state)
    state = abstract.without_keys(state)
    write = functools.partial(
      self._write,
      step,
      disk_space.needed_bytes(state),
      meta=meta,
      data=ocp.args.JsonSave(data_state),
    )
    if self._lazy is None:
      self.wait()
      self.claim()
      write(state)
      self._saved.add(step)
      return True
    self.claim()
    self._saved.add(step)
    give_up = functools.partial(self._saved.discard, step)
    try:
      self._lazy.save(state, write, given_up=give_up)
    except Exception:
      give_up()
      raise
    return True

  def claim(self) -> None:
    """Takes the right to save here; `save` does, if it was not done before.

    Raises:
      ValueError: Names the run that saves into the same folder.
    """
    if self._is_claimed:
      return
    error = None
    if jax.process_index() == 0:
      try:
        self._lock.acquire()
      except Exception as e:
        error = e
    if reason := agreement.first_error('claim', error):
      raise error or ValueError(reason)
    self._is_claimed = True

  def restore(
    self, abstract_state: Any, step: int | None = None, verify: bool = True
  ) -> tuple[Any, Any, dict[str, Any]]:
    """Reads a checkpoint onto the shardings of `abstract_state`.

    These need not be those it was saved with, nor on as many devices.

    Args:
      abstract_state: Pytree like the saved one, of arrays or
        `jax.ShapeDtypeStruct`s with shardings. A leaf without sharding comes
        back as a NumPy array.
      step: Which; `None` is the latest.
      verify: Whether to compare checksums first; each process reads a part of
        the files for it.

    Returns:
      The state, this process's data state, and the metadata.

    Raises:
      DamagedError: A `ValueError` that names the files, the arrays they belong
        to, and what to use instead.
      ValueError: No such checkpoint, an unfinished one, a state that it does
        not fit, or the data states of another number of processes that differ
        among each other.
    """
    self.wait()
    step = orbax_io.pick(self._manager, step)
    orbax_io.check_files(self._manager, step, verify)
    state = orbax_io.read_state(self._manager, step, abstract_state)
    data_state = orbax_io.read_data_state(self._manager, step)
    metadata = orbax_io.read_meta(self._manager, step)['metadata']
    return state, data_state, metadata

  def resume(self, abstract_state: Any) -> Resumed | None:
    """Reads the newest checkpoint that is whole; damaged ones are passed over.

    These are renamed, lest they count among the newest to keep. Call before
    `save`.

    Args:
      abstract_state: As in `restore`.

    Returns:
      `None` if there is no checkpoint at all.

    Raises:
      DamagedError: There are some, and none is whole.
      ValueError: As `restore`.
    """
    self.wait()
    # Processes may see a shared folder's newest entry at different times.
    steps = json.loads(
      agreement.gather('resume', json.dumps(self.all_steps()))[0]
    )
    damaged: dict[int, str] = {}
    for step in reversed(steps):
      try:
        found = self.restore(abstract_state, step)
      except DamagedError as e:
        _log.error('%s', e.damage)
        damaged[step] = e.damage
        continue
      self._set_aside(damaged)
      return Resumed(step, *found, damaged=list(damaged.values()))
    if damaged:
      raise DamagedError(
        f'no checkpoint in {self._manager.directory} is whole: '
        f'{"; ".join(damaged.values())}'
      )
    return None

  def verify(
    self,
    step: int | None = None,
    progress: Callable[[int], object] = lambda num_bytes: None,
  ) -> int:
    """Compares a checkpoint's files to their checksums.

    Args:
      step: Which; `None` is the latest.
      progress: Called with numbers of bytes that were read.

    Returns:
      Number of bytes compared by this process; 0 if the checkpoint was made
      without checksums.

    Raises:
      DamagedError: As `restore`.
      ValueError: No such checkpoint, or an unfinished one.
    """
    self.wait()
    step = orbax_io.pick(self._manager, step)
    return orbax_io.check_files(self._manager, step, progress=progress)

  def size_bytes(self, step: int) -> int | None:
    """What `verify` will read of a checkpoint; `None` if that is not known."""
    return orbax_io.listed_bytes(self._manager, step)

  def metrics(self, step: int) -> dict[str, float]:
    """The metrics a checkpoint was saved with; none if they are unreadable."""
    if step not in self._metrics:
      self._metrics[step] = orbax_io.read_metrics(self._manager, step)
    return self._metrics[step]

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
    """Waits until everything is on disk; raises what went wrong.

    Raises:
      NoSpaceError: The disk became full.
      SaveError: Anything else.
    """
    if self._lazy is not None:
      self._lazy.wait()
    self._finish()

  def _finish(self):
    try:
      self._manager.wait_until_finished()
    except Exception as e:
      self._forget_last()
      raise self._save_error(e) from e

  def _save_error(self, error):
    step, where = self._last, self._manager.directory
    latest = f'the latest checkpoint is {self._words_of_latest()}'
    if disk_space.is_full(error):
      return NoSpaceError(
        errno.ENOSPC,
        f'{where} became full while step {step} was written, which is '
        f'discarded; {latest}',
      )
    return SaveError(
      f'step {step} was not saved to {where} ({agreement.describe(error)}); '
      f'{latest}'
    )

  def close(self) -> None:
    """Waits, then frees threads. The manager is of no more use."""
    try:
      try:
        self.wait()
      finally:
        with contextlib.suppress(Exception):  # Raised by `wait` already.
          self._manager.close()
      if self._saved and jax.process_index() == 0:
        removal.make_durable(self._manager.directory)
    finally:
      self._lock.release()

  def __enter__(self) -> 'CheckpointManager':
    return self

  def __exit__(self, *error) -> None:
    self.close()

  def _write(self, step, needed, state, *, meta, data):
    """Gives a state to orbax; on the thread of lazy saves, to the end."""
    self._make_room(step, needed)
    self._last, self._metrics[step] = step, meta['metrics']
    self._together.begin()
    items = ocp.args.Composite(
      state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta), data=data
    )
    try:
      self._manager.save(step, args=items, force=True)
    except BaseException as e:
      self._forget_last()
      if self._lazy is None or not isinstance(e, Exception):
        raise
      raise self._save_error(e) from e
    if self._lazy is not None:
      self._finish()

  def _words_of_latest(self):
    step = self.latest_step()
    return 'none' if step is None else f'step {step}'

  def _forget_last(self):
    """Removes what a save that failed has left."""
    self._saved.discard(self._last)
    self._metrics.pop(self._last, None)
    self._manager.reload()
    self._is_clean = False
    if jax.process_index() == 0 and self._last is not None:
      for path in orbax_io.unfinished(self._manager, self._last):
        shutil.rmtree(path, ignore_errors=True)

  def _make_room(self, step, needed):
    """Removes what a killed or earlier run has left in the way.

    Raises:
      NoSpaceError: There is none for `needed` bytes.
    """
    if not self._is_clean and jax.process_index() == 0:
      for path in orbax_io.leftovers(self._manager):
        _log.warning('Removing %s, which is no whole checkpoint', path)
        path.rmtree()
    self._is_clean = True
    where = self._manager.directory
    words = agreement.gather('space', disk_space.shortage(where, needed))
    if shortage := next(filter(None, words), ''):
      raise NoSpaceError(
        errno.ENOSPC,
        f'step {step} is not saved: {shortage}; the latest checkpoint is '
        f'{self._words_of_latest()}',
      )
    if step in self._manager.all_steps():
      _log.warning('Replacing step %d in %s', step, where)
      self._manager.delete(step)

  def _set_aside(self, damaged):
    if not damaged:
      return
    self.claim()  # What another run saves into is not ours to change.
    for step in damaged:
      self._metrics.pop(step, None)
    if jax.process_index() == 0:
      for step in damaged:
        path = orbax_io.set_aside(self._manager, step)
        _log.error('Renamed the damaged step %d to %s', step, path)
    agreement.gather('set_aside', '')
    self._manager.reload()

  def _list_files(self):
    if jax.process_index() == 0 and not self._is_bucket:
      try:
        for folder in orbax_io.unfinished(self._manager, self._last):
          file_list.write(pathlib.Path(folder))
      except BaseException as e:
        self._together.fail(e)
        raise


def _check_json(name, value):
  try:
    json.dumps(value)
  except (TypeError, ValueError) as e:
    raise ValueError(f'{name} is not JSON: {e}') from e
