"""What one call of `jaxtrain.loop.train` does, step by step.

One program is compiled before the first step and called until the end, so that
nothing can compile later. Metrics are read one step late: while the host waits
for step n, step n + 1 is already on the device.
"""

from collections.abc import Iterable
import dataclasses
import os
import pathlib
import time
from typing import Any

from flax import linen as nn
import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

from jaxtrain import distributed
from jaxtrain import hardware
from jaxtrain import train_state as train_state_lib
from jaxtrain import train_step as train_step_lib
from jaxtrain.checkpoints.in_memory.snapshots import InMemorySnapshots
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.evaluate import evaluate
from jaxtrain.goodput import Goodput
from jaxtrain.heartbeat import Heartbeat
from jaxtrain.interrupt import StopSignal
from jaxtrain.interrupt import with_stop
from jaxtrain.meter import Meter
from jaxtrain.metrics import MetricsWriter
from jaxtrain.parallel.context.base import Context
from jaxtrain.progress import Progress
from jaxtrain.sharding.partition import named_sharding
from jaxtrain.sharding.rules import ShardingRules
from jaxtrain.train_state import TrainState
from jaxtrain.watch import Watch

Dataset = Iterable[dict[str, np.ndarray]]


class NonFiniteError(RuntimeError):
  """The loss or the gradient became infinite or not a number."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """What a call of `train` did.

  Attributes:
    state: The last state.
    step: Updates made since the run began.
    history: A dict per row of metrics of this call: 'step', then 'loss' and
      what else `make_train_step` reports (means over the steps since the last
      row), 'tokens_per_s', 'mfu', and 'eval_loss', 'eval_accuracy' where
      evaluated.
    stopped_by: Signal that ended it early, 'data' if there was no more, or
      `None` when all steps were made.
    compile_s: Seconds spent compiling the steps.
    num_programs: Programs compiled: initialisation, training step, evaluation,
      fingerprint.
    tokens_per_s: Positions (padding included) trained on per second, without
      compiling, evaluating and saving; 0 if no step was timed.
    mfu: Model FLOPs utilisation, 0..1; `None` if the peak is not known.
    goodput: Seconds of this call by `goodput.CATEGORIES`, see
      `goodput.Incarnation`; `goodput.read` adds up those of a run.
  """

  state: TrainState
  step: int
  history: list[dict[str, float]]
  stopped_by: str | None
  compile_s: float
  num_programs: int
  tokens_per_s: float
  mfu: float | None
  goodput: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Held-out batches, and when to use how many of them."""

  dataset: Dataset
  every: int | None
  batches: int


@dataclasses.dataclass(frozen=True)
class _Dispatched:
  """A step that is on its way, with what its metrics will be read for."""

  step: int
  metrics: Any
  batch: dict[str, np.ndarray]
  fingerprint: jax.Array | None = None


class RunFiles:
  """Checkpoints and metrics of a run, or neither without a folder."""

  def __init__(
    self, workdir: str | os.PathLike | None, save_every: int, keep: int
  ):
    self.workdir = None if workdir is None else pathlib.Path(workdir)
    self.checkpoints = self.metrics = None
    if self.workdir is not None:
      self.checkpoints = CheckpointManager(
        self.workdir / 'checkpoints', keep=keep, save_every_steps=save_every
      )
      self.metrics = MetricsWriter(self.workdir)
    self.goodput = Goodput(self.workdir if jax.process_index() == 0 else None)

  def __enter__(self):
    return self

  def __exit__(self, *error):
    if error[0] is not None:
      self.goodput.end(error[0].__name__)
    if self.workdir is not None:
      self.metrics.close()
      self.checkpoints.close()


@dataclasses.dataclass(eq=False)
class Run:
  """The parts of a run, and where it stands."""

  model: nn.Module
  tx: optax.GradientTransformation
  mesh: Mesh
  rules: ShardingRules
  step_fn: Any
  files: RunFiles
  shown: Progress
  steps: int
  log_every: int
  metadata: dict[str, Any] | None
  evaluation: Evaluation | None
  context: Context | None = None
  heartbeat: Heartbeat | None = None
  snapshots: InMemorySnapshots | None = None
  snapshot_every: int = 1

  def __post_init__(self):
    self.batch_sharding = named_sharding(self.mesh, self.rules, 'batch', 'seq')
    self.compiled = self.eval_step = self.meter = self.batch_shape = None
    self.compile_s, self.num_programs = 0.0, 0
    self.saved_at = self.evaluated_at = self.snapshot_at = None
    self.history, self.window = [], []
    self.goodput = self.files.goodput
    self.watch = Watch(self.goodput, self.heartbeat, self.mesh)

  def start(self, dataset: Dataset, seed: int) -> None:
    """Makes the first state, or reads the latest checkpoint."""
    with self.goodput.measure(self.goodput.start_category):
      self._start(dataset, seed)
    self.watch.resumed(self.step)
    self.shown.start(self.step)

  def _start(self, dataset, seed):
    self.iterator = iter(dataset)
    checkpoints = self.files.checkpoints
    self.step = checkpoints.latest_step() if checkpoints else None
    if self._resumed_from_memory():
      return
    if self.step is None:
      self.step = 0
      self.state = train_state_lib.init_state(
        self.model, self.tx, self.mesh, self.rules, seed=seed
      )
      self.num_programs += 1
    else:
      spec = train_state_lib.state_spec(
        self.model, self.tx, self.mesh, self.rules
      )
      state, data_state, _ = checkpoints.restore(vars(spec.abstract))
      self.state, self.saved_at = TrainState(**state), self.step
      self._forward_data(data_state)
      self.shown.say(f'resumed from step {self.step} of {self.files.workdir}')

  def _resumed_from_memory(self):
    """Takes the newest snapshot, unless storage has a newer step."""
    steps = self.snapshots.steps() if self.snapshots else []
    if not steps or (self.step is not None and self.step > steps[-1]):
      return False
    self.step = self.snapshot_at = steps[-1]
    spec = train_state_lib.state_spec(
      self.model, self.tx, self.mesh, self.rules
    )
    state, data_state, _ = self.snapshots.restore(
      vars(spec.abstract), self.step
    )
    self.state = TrainState(**state)
    self._forward_data(data_state)
    self.shown.say(f'resumed from step {self.step} in memory')
    return True

  def _forward_data(self, data_state):
    if data_state is not None:
      self.iterator.set_state(data_state)
      return
    for _ in range(self.step):
      next(self.iterator)

  def loop(self, stop: StopSignal) -> str | None:
    """Makes the steps; returns why it ended early, or `None`."""
    with self.watch.doing('step'):
      return self._loop(stop)

  def _loop(self, stop):
    ahead = None
    while self.step < self.steps:
      batch = self._next_batch(ahead)
      if batch is None:
        self._read(ahead)
        return 'data'
      metrics = self._step(batch, stop.flags(self.mesh))
      fingerprint = self.watch.fingerprint(
        self.step, self.state.params, self._is_save_due(), self._compile
      )
      behind, ahead = (
        ahead,
        _Dispatched(self.step, metrics, batch, fingerprint),
      )
      stopped = self._read(behind)
      if stopped or self._is_anything_due():
        # What is saved must be known to be finite.
        stopped = self._read(ahead) or stopped
        ahead = None
      if stopped:
        return stop.name
      if ahead is None:
        with self.meter.paused():
          if self._is_evaluation_due():
            self._evaluate()
          self._save(force=False)
          self._snapshot()
    self._read(ahead)
    return None

  def _next_batch(self, ahead):
    with self.watch.doing('data') as wait:
      batch = next(self.iterator, None)
      # While the devices have a step to make, nothing is lost.
      if ahead is not None and not ahead.metrics['stop'].is_ready():
        wait.count_as('step')
    return batch

  def finish(self, stopped_by: str | None) -> None:
    """Evaluates, unless time is short, and saves the last step."""
    if self.window:
      self._log(self.step)
    if self.evaluation and self.evaluated_at != self.step:
      if stopped_by in (None, 'data'):
        self._evaluate()
    self._save(force=True)
    if self.files.checkpoints:
      with self.watch.doing('checkpoint'):
        self.files.checkpoints.wait()
    self.watch.end(stopped_by or 'steps')

  def result(self, stopped_by: str | None) -> TrainResult:
    """What has been done."""
    rates = self.meter.overall() if self.meter else {}
    return TrainResult(
      state=self.state,
      step=self.step,
      history=self.history,
      stopped_by=stopped_by,
      compile_s=self.compile_s,
      num_programs=self.num_programs,
      tokens_per_s=rates.get('tokens_per_s', 0.0),
      mfu=rates.get('mfu'),
      goodput=self.goodput.seconds(),
    )

  def _step(self, batch, flags):
    """Dispatches one step; compiles it if it is the first."""
    # On CPUs this may wait for the step before, and so for the others.
    with self.watch.on_device():
      return self._dispatch(batch, flags)

  def _dispatch(self, batch, flags):
    arrays = distributed.global_batch(batch, self.batch_sharding)
    shape = arrays['tokens'].shape
    if self.compiled is None:
      shardings = jax.tree.map(lambda x: x.sharding, self.state)
      step = jax.jit(
        with_stop(self.step_fn),
        donate_argnums=0,
        out_shardings=(shardings, NamedSharding(self.mesh, P())),
      )
      self.compiled = self._compile('step', step, self.state, arrays, flags)
      self.batch_shape = shape
      flops = self.model.config.train_flops_per_token(shape[1])
      peak = hardware.peak(list(self.mesh.devices.flat))
      self.meter = Meter(shape[0] * shape[1], flops, peak)
      self.meter.start()
    if shape != self.batch_shape:
      raise ValueError(
        f'step {self.step + 1}: a batch of shape {shape} after batches of '
        f'shape {self.batch_shape}; the step is compiled for one shape'
      )
    self.state, metrics = self.compiled(self.state, arrays, flags)
    self.step += 1
    return metrics

  def _compile(self, name, function, *args):
    start = time.perf_counter()
    with self.watch.doing('compile'):
      compiled = function.lower(*args).compile()
    seconds = time.perf_counter() - start
    self.compile_s += seconds
    self.num_programs += 1
    self.shown.say(f'compiled the {name} in {seconds:.1f} s')
    return compiled

  def _read(self, dispatched):
    """Waits for a step, checks and notes its metrics; whether to stop."""
    if dispatched is None:
      return False
    with self.watch.on_device():
      metrics = {k: float(v) for k, v in dispatched.metrics.items()}
    stop = bool(metrics.pop('stop'))
    self.meter.step()
    self.shown.step()
    if not metrics.pop('finite'):
      raise NonFiniteError(self._describe(dispatched, metrics))
    self.watch.step_done(dispatched.step, dispatched.fingerprint)
    self.window.append(metrics)
    if dispatched.step % self.log_every == 0:
      self._log(dispatched.step)
    return stop

  def _log(self, step):
    """Notes means over the steps since the last time, and rates."""
    means = {
      name: float(np.mean([m[name] for m in self.window]))
      for name in self.window[0]
    }
    self.window = []
    self._note(step, means | self.meter.recent())
    if self.files.metrics:
      parts = self.goodput.fractions()
      self.files.metrics.write(
        step, {f'goodput/{name}': part for name, part in parts.items()}
      )

  def _note(self, step, values):
    if not self.history or self.history[-1]['step'] != step:
      self.history.append({'step': step})
    self.history[-1].update(values)
    if self.files.metrics:
      self.files.metrics.write(step, values)
    self.shown.show(step, values)

  def _is_evaluation_due(self):
    e = self.evaluation
    return bool(e and e.every and self.step % e.every == 0)

  def _is_save_due(self):
    checkpoints = self.files.checkpoints
    return bool(checkpoints and checkpoints.should_save(self.step))

  def _is_snapshot_due(self):
    every = self.snapshot_every
    return bool(self.snapshots and self.step % every == 0)

  def _is_anything_due(self):
    return (
      self._is_evaluation_due()
      or self._is_save_due()
      or self._is_snapshot_due()
    )

  def _evaluate(self):
    with self.watch.doing('evaluation'):
      values = self._evaluation()
    self.evaluated_at = self.step
    self._note(self.step, values)

  def _evaluation(self):
    e = self.evaluation
    if self.eval_step is None:
      function = train_step_lib.make_eval_step(
        self.model, self.mesh, self.rules, self.context
      )
      first = next(iter(e.dataset))
      arrays = distributed.global_batch(first, self.batch_sharding)
      self.eval_step = self._compile(
        'evaluation', function, self.state.params, arrays
      )
    return evaluate(
      self.eval_step,
      self.state.params,
      e.dataset,
      self.batch_sharding,
      e.batches,
    )

  def _save(self, force):
    checkpoints = self.files.checkpoints
    if checkpoints is None or self.saved_at == self.step:
      return
    if not (force or self._is_save_due()):
      return
    with self.watch.doing('checkpoint'):
      checkpoints.save(
        self.step,
        vars(self.state),
        data_state=self._data_state(),
        config=self.model.config,
        metadata=self.metadata,
        force=force,
      )
    self.saved_at = self.step

  def _snapshot(self):
    if not self._is_snapshot_due() or self.snapshot_at == self.step:
      return
    with self.watch.doing('checkpoint'):
      self.snapshots.save(
        self.step,
        vars(self.state),
        data_state=self._data_state(),
        metadata=self.metadata,
      )
    self.snapshot_at = self.step

  def _data_state(self):
    get_state = getattr(self.iterator, 'get_state', None)
    return get_state() if get_state else None

  def _describe(self, dispatched, metrics):
    """Saves the batch; returns the message that names it."""
    values = ', '.join(f'{k}={v}' for k, v in metrics.items())
    message = f'step {dispatched.step} is not finite ({values}).'
    if self.files.workdir is None:
      return message + ' Without a workdir neither it nor its batch is saved.'
    path = self.files.workdir / (
      f'non_finite_step_{dispatched.step}_process_{jax.process_index()}.npz'
    )
    np.savez(path, **dispatched.batch)
    self.files.checkpoints.wait()
    good = self.files.checkpoints.latest_step()
    where = self.files.workdir / 'checkpoints'
    last = 'none yet' if good is None else f'step {good} in {where}'
    return f'{message} Its batch is in {path}; last good checkpoint: {last}.'
