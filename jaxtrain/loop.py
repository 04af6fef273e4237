"""The training loop: data in, checkpoints and metrics out.

`train` is a library function: it takes a model, an optimizer and batches, and
knows of no flags. How it goes about it is in `run.py`.
"""

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
from jaxtrain.run import RunFiles
from jaxtrain.run import TrainResult
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
  keep: int = 3,
  metadata: dict[str, Any] | None = None,
  eval_dataset: Dataset | None = None,
  eval_every: int | None = None,
  eval_batches: int = 16,
  log_every: int = 10,
  progress: bool = True,
  context: Context | None = None,
  heartbeat: Heartbeat | None = None,
  snapshots: InMemorySnapshots | None = None,
  snapshot_every: int = 1,
  **step_options: Any,
) -> TrainResult:
  """Trains until `steps` updates are made, going on from a checkpoint.

  SIGTERM and SIGINT end it after the step at hand, with a checkpoint. Called
  again with the same arguments it goes on as if nothing had happened, bit for
  bit.

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
    keep: Number of checkpoints to keep.
    metadata: JSON types to keep with every checkpoint.
    eval_dataset: Batches to evaluate on, iterated from its start each time.
    eval_every: Steps between evaluations; `None` evaluates at the end only.
    eval_batches: Batches per evaluation, fewer if there are no more.
    log_every: Steps between rows of metrics.
    progress: Whether process 0 shows progress.
    context: See `make_train_step`.
    heartbeat: Tells a supervisor how far it is and what the parameters'
      checksums are; is closed at the end.
    snapshots: A second, faster tier of checkpoints in the memory of other
      processes. The newest state of either tier is where it goes on; it stays
      open.
    snapshot_every: Steps between snapshots. After each of these steps the host
      waits for the devices.
    **step_options: Of `make_train_step`: accumulation, max_grad_norm, z_loss,
      learning_rate, noise_scale, mean_square.

  Returns:
    What was done.

  Raises:
    ValueError: Sizes below 1, batches that do not fit the mesh or change their
      shape, a checkpoint that does not fit the model.
    NonFiniteError: Names the step, the batch (saved in `workdir`) and the last
      good checkpoint. Nothing is saved over that.
  """
  _check_sizes(
    steps=steps,
    save_every=save_every,
    keep=keep,
    eval_every=eval_every,
    eval_batches=eval_batches,
    log_every=log_every,
    snapshot_every=snapshot_every,
  )
  model = model.clone(shard=constrainer(mesh, rules))
  step_fn = train_step_lib.make_train_step(
    model, tx, mesh, rules, context=context, **step_options
  )
  shown = Progress(steps, shown=progress and jax.process_index() == 0)
  with (
    heartbeat or contextlib.nullcontext(),
    shown,
    StopSignal() as stop,
    RunFiles(workdir, save_every, keep) as files,
  ):
    run = Run(
      model=model, tx=tx, mesh=mesh, rules=rules, step_fn=step_fn, files=files,
      shown=shown, steps=steps, log_every=log_every, metadata=metadata,
      evaluation=_evaluation(eval_dataset, eval_every, eval_batches),
      context=context, heartbeat=heartbeat, snapshots=snapshots,
      snapshot_every=snapshot_every,
    )  # fmt: skip
    run.start(dataset, seed)
    stopped_by = run.loop(stop)
    run.finish(stopped_by)
  return run.result(stopped_by)


def _evaluation(dataset, every, batches):
  return None if dataset is None else Evaluation(dataset, every, batches)


def _check_sizes(**sizes):
  for name, value in sizes.items():
    if value is not None and value < 1:
      raise ValueError(f'{name}={value} must be at least 1')
