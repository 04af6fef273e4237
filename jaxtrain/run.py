"""What one call of `jaxtrain.loop.train` does, step by step.

One program (two, if saves are lazy) is compiled before the first step and
called until the end, so that nothing can compile later but, at the first lazy
save, what cuts replicas in parts. Metrics are read one step late: while the
host waits for step n, step n + 1 is already on the device.
"""

from collections.abc import Iterable
import dataclasses
import time
from typing import Any

from flax import linen as nn
import jax
from jax.sharding import Mesh
import numpy as np
import optax

from jaxtrain import distributed
from jaxtrain import hardware
from jaxtrain import train_state as train_state_lib
from jaxtrain import train_step as train_step_lib
from jaxtrain.checkpoints.manager import SaveError
from jaxtrain.evaluate import evaluate
from jaxtrain.heartbeat import Heartbeat
from jaxtrain.interrupt import StopSignal
from jaxtrain.meter import Meter
from jaxtrain.parallel.context.base import Context
from jaxtrain.progress import Progress
from jaxtrain.run_files import RunFiles
from jaxtrain.sharding.partition import named_sharding
from jaxtrain.sharding.rules import ShardingRules
from jaxtrain.step_programs import compile_step
from jaxtrain.train_state import TrainState
from jaxtrain.watch import Watch

Dataset = Iterable[dict[str, np.ndarray]]

# Under which name a checkpoint's metadata have what the loop adds to them.
_LOOP = 'loop'


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
  num_tokens: int
  fingerprint: jax.Array | None


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

  def __post_init__(self):
    self.batch_sharding = named_sharding(self.mesh, self.rules, 'batch', 'seq')
    self.compiled = {}  # By shape of the batch.
    self.eval_step = self.meter = None
    self.compile_s, self.num_programs = 0.0, 0
    self.saved_at = self.evaluated_at = self.snapshot_at = None
    self.history, self.window, self.observed = [], [], {}
    self.goodput = self.files.goodput
    self.watch = Watch(self.goodput, self.heartbeat, self.mesh)

  def start(self, dataset: Dataset, seed: int) -> None:
    """Makes the first state, or reads the newest that is whole."""
    with self.watch.doing(self.goodput.start_category):
      self._start(dataset, seed)
    self.watch.resumed(self.step)
    self.shown.start(self.step)

  def _start(self, dataset, seed):
    self.iterator = iter(dataset)
    arguments = self.model, self.tx, self.mesh, self.rules
    found, is_stored = self.files.resume(
      lambda: vars(train_state_lib.state_spec(*arguments).abstract),
      self.shown.say,
    )
    if found is None:
      self.step = 0
      self.state = train_state_lib.init_state(*arguments, seed=seed)
      self.num_programs += 1
      return
    self.step = found.step
    if is_stored:
      self.saved_at = found.step
    else:
      self.snapshot_at = found.step
    self.state = TrainState(**found.state)
    self._forward_data(found.data_state)
    loop = found.metadata.get(_LOOP, {})
    self.window = loop.get('window', [])
    self.evaluated_at = loop.get('evaluated_at')

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
      behind, ahead = ahead, self._step(batch, stop.flags(self.mesh))
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
    if self.window and stopped_by in (None, 'data'):
      self._log(self.step)  # Else the run that goes on has the whole window.
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
    """Dispatches one step; compiles it if it is the first of its shape."""
    # On CPUs this may wait for the step before, and so for the others.
    with self.watch.on_device():
      arrays = distributed.global_batch(batch, self.batch_sharding)
      shape = arrays['tokens'].shape
      if shape not in self.compiled:
        self._add_program(shape, arrays, flags)
      self.state, metrics = self.compiled[shape](self.state, arrays, flags)
      self.step += 1
    fingerprint = self.watch.fingerprint(
      self.step, self.state.params, self._is_save_due(), self._compile
    )
    tokens = shape[0] * shape[1]
    return _Dispatched(self.step, metrics, batch, tokens, fingerprint)

  def _add_program(self, shape, arrays, flags):
    if len(self.compiled) >= getattr(self.iterator, 'num_shapes', 1):
      raise ValueError(
        f'step {self.step + 1}: a batch of shape {shape} after batches of '
        f'shape {", ".join(map(str, self.compiled))}; the step is compiled for '
        f'{len(self.compiled)} shape(s)'
      )
    if self.meter is None:
      flops = self.model.config.train_flops_per_token(shape[1])
      peak = hardware.peak(list(self.mesh.devices.flat))
      self.meter = Meter(flops, peak)
    with self.meter.paused():
      self.compiled[shape] = compile_step(
        self.step_fn,
        (self.state, arrays, flags),
        self.mesh,
        self._compile,
        self.files.wait_copied,
      )

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
    self.meter.step(dispatched.num_tokens)
    self.shown.step()
    if not metrics.pop('finite'):
      raise NonFiniteError(self._describe(dispatched, metrics))
    self.watch.step_done(dispatched.step, dispatched.fingerprint)
    if observe := getattr(self.iterator, 'observe', None):
      self.observed = observe(metrics)
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
    rates = self.meter.recent() if self.meter else {}  # Of no step yet.
    parts = self.goodput.fractions() if self.files.metrics else {}
    self._note(
      step,
      means | self.observed | rates,
      {f'goodput/{name}': part for name, part in parts.items()},
    )

  def _note(self, step, values, only_written=None):
    if not self.history or self.history[-1]['step'] != step:
      self.history.append({'step': step})
    self.history[-1].update(values)
    if self.files.metrics:
      self.files.metrics.write(step, values | (only_written or {}))
    self.shown.show(step, values)

  def _is_evaluation_due(self):
    e = self.evaluation
    return bool(e and e.every and self.step % e.every == 0)

  def _is_save_due(self):
    # The last step is saved by `finish`, evaluated.
    return self.step < self.steps and self.files.save_due(self.step)

  def _is_anything_due(self):
    return (
      self._is_evaluation_due()
      or self._is_save_due()
      or self.files.snapshot_due(self.step)
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
    try:
      with self.watch.doing('checkpoint'):
        checkpoints.save(
          self.step,
          vars(self.state),
          **self._beside_state(),
          config=self.model.config,
          metrics=self._measured(),
          force=force,
        )
    except SaveError as e:
      if self.files.saves.failed_save == 'raise' or self.step == self.steps:
        raise
      self.shown.say(f'WARNING: training goes on without a checkpoint: {e}')
      return
    self.saved_at = self.step

  def _snapshot(self):
    if not self.files.snapshot_due(self.step) or self.snapshot_at == self.step:
      return
    with self.watch.doing('checkpoint'):
      self.files.saves.snapshots.save(
        self.step, vars(self.state), **self._beside_state()
      )
    self.snapshot_at = self.step

  def _beside_state(self):
    get_state = getattr(self.iterator, 'get_state', None)
    # What has been measured since the last row of metrics.
    loop = {'window': self.window, 'evaluated_at': self.evaluated_at}
    return dict(
      data_state=get_state() if get_state else None,
      metadata={**(self.metadata or {}), _LOOP: loop},
    )

  def _measured(self):
    """The metrics of exactly this step, for its checkpoint."""
    row = self.history[-1] if self.history else {}
    metrics = {} if row.get('step') != self.step else dict(row)
    best = self.files.saves.keep_best
    if best and best[0] not in metrics:
      self.shown.say(
        f'step {self.step} is saved without {best[0]}, so it is not among the '
        'best'
      )
    return metrics

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
