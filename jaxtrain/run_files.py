"""What a run leaves behind, and goes on from: checkpoints and metrics."""

from collections.abc import Callable, Sequence
import dataclasses
import os
import pathlib
from typing import Any

import jax

from jaxtrain.checkpoints import agreement
from jaxtrain.checkpoints import lazy
from jaxtrain.checkpoints.in_memory.snapshots import InMemorySnapshots
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.checkpoints.manager import Resumed
from jaxtrain.goodput import Goodput
from jaxtrain.metrics import MetricsWriter

_FAILED_SAVE = ('raise', 'go_on')


@dataclasses.dataclass(frozen=True)
class Saves:
  """When and how to save; see `loop.train`."""

  save_every: int
  keep: int | None
  keep_every: int | None
  keep_best: Sequence | None
  failed_save: str
  saving: str
  staging_gib: float | None
  snapshots: InMemorySnapshots | None
  snapshot_every: int

  def __post_init__(self):
    check_sizes(
      save_every=self.save_every,
      keep=self.keep,
      snapshot_every=self.snapshot_every,
    )
    if self.failed_save not in _FAILED_SAVE:
      raise ValueError(
        f'failed_save={self.failed_save!r} must be one of '
        f'{", ".join(_FAILED_SAVE)}'
      )
    lazy.check_saving(self.saving, self.staging_gib)


class RunFiles:
  """Checkpoints, snapshots, metrics and the account of time of a run.

  Args:
    workdir: Folder; `None` writes nothing to storage.
    saves: When and how to save.

  Attributes:
    workdir: As given.
    saves: As given.
    checkpoints: `None` without a folder.
    metrics: `None` without a folder.
    goodput: Account of time.
  """

  def __init__(self, workdir: str | os.PathLike | None, saves: Saves):
    self.workdir = None if workdir is None else pathlib.Path(workdir)
    self.saves = saves
    self.checkpoints = self.metrics = None
    if self.workdir is not None:
      self.checkpoints = CheckpointManager(
        self.workdir / 'checkpoints',
        keep=saves.keep,
        save_every_steps=saves.save_every,
        keep_every=saves.keep_every,
        keep_best=saves.keep_best,
        saving=saves.saving,
        staging_gib=saves.staging_gib,
      )
      self.metrics = MetricsWriter(self.workdir)
    self.goodput = Goodput(self.workdir if jax.process_index() == 0 else None)

  def __enter__(self) -> 'RunFiles':
    return self

  def __exit__(self, *error) -> None:
    if error[0] is not None:
      self.goodput.end(error[0].__name__)
    if self.workdir is not None:
      self.metrics.close()
      self.checkpoints.close()

  def resume(
    self, abstract_state: Callable[[], Any], say: Callable[[str], None]
  ) -> tuple[Resumed | None, bool]:
    """Reads the newest state of memory and storage that is whole.

    Args:
      abstract_state: Makes what `CheckpointManager.restore` takes.
      say: Tells a person.

    Returns:
      What was found, and whether in storage.
    """
    latest = None
    if self.checkpoints:
      self.checkpoints.claim()
      latest = self.checkpoints.latest_step()
    snapshots = self.saves.snapshots
    steps = snapshots.steps() if snapshots else []
    # Processes may see a shared folder's newest entry at different times.
    stored = agreement.gather('tiers', '' if latest is None else str(latest))[0]
    if steps and (not stored or int(stored) <= steps[-1]):
      found = _from_memory(snapshots, abstract_state(), steps[-1], say)
      if found is not None:
        say(f'resumed from step {found.step} in memory')
        return found, False
    if not stored:
      return None, False
    found = self.checkpoints.resume(abstract_state())
    if found is not None:
      for damage in found.damaged:
        say(f'WARNING: {damage}')
      say(f'resumed from step {found.step} of {self.workdir}')
    return found, True

  def save_due(self, step: int) -> bool:
    """Whether a checkpoint of this step is to be made."""
    return bool(self.checkpoints and self.checkpoints.should_save(step))

  def snapshot_due(self, step: int) -> bool:
    """Whether a snapshot of this step is to be taken."""
    saves = self.saves
    return bool(saves.snapshots and step % saves.snapshot_every == 0)

  def wait_copied(self) -> None:
    """Waits until a state that was given to be saved may be donated."""
    if self.checkpoints is not None:
      self.checkpoints.wait_copied()


def _from_memory(snapshots, abstract_state, step, say):
  """A snapshot, or `None` if a process cannot read its part of it."""
  found = error = None
  try:
    found = Resumed(step, *snapshots.restore(abstract_state, step), damaged=[])
  except ValueError as e:
    error = e
  if reason := agreement.first_error('memory', error):
    say(f'WARNING: step {step} in memory is not used: {reason}')
    return None
  return found


def check_sizes(**sizes: int | None) -> None:
  """Checks that every number that is given is positive.

  Raises:
    ValueError: Names one that is not.
  """
  for name, value in sizes.items():
    if value is not None and value < 1:
      raise ValueError(f'{name}={value} must be at least 1')
