"""The training loop: data in, checkpoints and metrics out.

`train` is a library function: it takes a model, an optimizer and batches, and
knows of no flags. How it goes about it is in `run.py`.
"""

from collections.abc import Sequence
import contextlib
import os
from typing import Any

from flax import linen as nn
import jax
from jax.sharding import Mesh
import optax

from jaxtrain import train_step as train_step_lib
from jaxtrain.checkpoints.in_memory.snapshots import InMemorySnapshots
from jaxtrain.heartbeat import Heartbeat
from jaxtrain.interrupt import StopSignal
from jaxtrain.parallel.context.base import Context
from jaxtrain.progress import Progress
from jaxtrain.run import Dataset
from jaxtrain.run import Evaluation
from jaxtrain.run import NonFiniteError
from jaxtrain.run import Run
from jaxtrain.run import TrainResult
from jaxtrain.run_files import RunFiles
from jaxtrain.run_files import Saves
from jaxtrain.run_files import check_sizes
from jaxtrain.sharding.partition import constrainer
from jaxtrain.sharding.rules import ShardingRules

__all__ = ['NonFiniteError', 'TrainResult', 'train']


def train(
  model: nn.Module,
  tx: optax.GradientTransformation,
  dataset: Dataset,
  *,
  mesh: Mesh,
  rules: ShardingRules,
  steps: int,
  seed: int = 0,
  workdir: str | os.PathLike | None = None,
  save_every: int = 1000,
  keep: int | None = 3,
  keep_every: int | None = None,
  keep_best: Sequence | None = None,
  failed_save: str = 'raise',
  saving: str = 'async',
  staging_gib: float | None = None,
  snapshots: InMemorySnapshots | None = None,
  snapshot_every: int = 1,
  metadata: dict[str, Any] | None = None,
  eval_dataset: Dataset | None = None,
  eval_every: int | None = None,
  eval_batches: int = 16,
  log_every: int = 10,
  progress: bool = True,
  context: Context | None = None,
  heartbeat: Heartbeat | None = None,
  **step_options: Any,
) -> TrainResult:
  """Trains until `steps` updates are made, going on from a checkpoint.

  SIGTERM and SIGINT end it after the step at hand, with a checkpoint. Called
  again with the same arguments it goes on as if nothing had happened, bit for
  bit. If the newest checkpoint is damaged, it says so and goes on from the one
  before.

  Args:
    model: `Transformer`; its `shard` is set here.
    tx: Optimizer.
    dataset: Batches of this process: dicts of `train_step.BATCH_KEYS` with the
      rows `distributed.batch_share` names. Its iterator should have `get_state`
      and `set_state`; one that has not is run through up to where the
      checkpoint was made.
    mesh: Devices.
    rules: Logical to mesh axes.
    steps: Number of updates of the whole run.
    seed: Of the initial parameters and the run's random key.
    workdir: Folder for `checkpoints/`, `metrics.csv`, `tensorboard/` and
      `goodput.jsonl`; `None` writes nothing.
    save_every: Steps between checkpoints; the last step is always saved.
    keep: Number of newest checkpoints to keep; `None` keeps all.
    keep_every: Checkpoints of steps that are a multiple of it are kept for
      good.
    keep_best: Such as `('eval_loss', 'min', 1)`: a metric, 'min' or 'max', and
      how many of the best checkpoints to keep. Those of steps at which it was
      not measured do not count, so `eval_every` should divide `save_every`.
    failed_save: 'raise' ends training at the save that fails, or at the one
      after a save that failed in the background (a full disk, say); 'go_on'
      warns and tries again at the next. At the end it raises in any case.
    saving: 'async', where the next step waits until the state is copied off the
      devices, or 'lazy', where the copies overlap it. Lazy steps are two
      programs (`make_split_step`), rounded otherwise than one.
    staging_gib: Host memory for lazy copies, per process; `None` is half of
      what is free. If it is less than the state, an update may have to wait for
      the disk.
    snapshots: A second, faster tier of checkpoints in the memory of other
      processes. The newest state of either tier is where it goes on; it stays
      open.
    snapshot_every: Steps between snapshots. After each of these steps the host
      waits for the devices.
    metadata: JSON types to keep with every checkpoint.
    eval_dataset: Batches to evaluate on, iterated from its start each time.
    eval_every: Steps between evaluations; `None` evaluates at the end only.
    eval_batches: Batches per evaluation, fewer if there are no more.
    log_every: Steps between rows of metrics.
    progress: Whether process 0 shows progress.
    context: See `make_train_step`.
    heartbeat: Tells a supervisor how far it is and what the parameters'
      checksums are; is closed at the end.
    **step_options: Of `make_train_step`: accumulation, max_grad_norm, z_loss,
      learning_rate, noise_scale, mean_square.

  Returns:
    What was done.

  Raises:
    ValueError: Sizes below 1, an unknown `saving`, `staging_gib` that is not
      positive or less than one array, batches that do not fit the mesh or
      change their shape, a checkpoint that does not fit the model, checkpoints
      of which none is whole, another run in the same folder.
    SaveError: A checkpoint could not be written; the one before it is whole.
    NonFiniteError: Names the step, the batch (saved in `workdir`) and the last
      good checkpoint. Nothing is saved over that.
  """
  check_sizes(steps=steps, log_every=log_every)
  check_sizes(eval_every=eval_every, eval_batches=eval_batches)
  saves = Saves(
    *(save_every, keep, keep_every, keep_best, failed_save),
    *(saving, staging_gib, snapshots, snapshot_every),
  )
  model = model.clone(shard=constrainer(mesh, rules))
  parts = dict(model=model, tx=tx, mesh=mesh, rules=rules)
  step_fn = _STEP_MAKERS[saving](**parts, context=context, **step_options)
  with (
    heartbeat or contextlib.nullcontext(),
    Progress(steps, shown=progress and jax.process_index() == 0) as shown,
    StopSignal() as stop,
    RunFiles(workdir, saves) as files,
  ):
    run = Run(
      **parts,
      step_fn=step_fn,
      files=files,
      shown=shown,
      steps=steps,
      log_every=log_every,
      metadata=metadata,
      evaluation=_evaluation(eval_dataset, eval_every, eval_batches),
      context=context,
      heartbeat=heartbeat,
    )
    run.start(dataset, seed)
    stopped_by = run.loop(stop)
    run.finish(stopped_by)
  return run.result(stopped_by)


def _evaluation(dataset, every, batches):
  return None if dataset is None else Evaluation(dataset, every, batches)


# Lazy saves copy the state while the gradients are computed.
_STEP_MAKERS = {
  'async': train_step_lib.make_train_step,
  'lazy': train_step_lib.make_split_step,
}
