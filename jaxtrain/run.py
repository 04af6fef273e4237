"""What one call of `jaxtrain.loop.train` does, step by step.

One program (two, if saves are lazy) is compiled before the first step and
called until the end, so that nothing can compile later but, at the first lazy
save, what cuts replicas in parts. Metrics are read one step late: while the
host waits for step n, step n + 1 is already on the device.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import functools
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
from jaxtrain.checkpoints import lazy
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.checkpoints.manager import SaveError
from jaxtrain.evaluate import evaluate
from jaxtrain.interrupt import StopSignal
from jaxtrain.interrupt import with_stop
from jaxtrain.meter import Meter
from jaxtrain.metrics import MetricsWriter
from jaxtrain.parallel.context.base import Context
from jaxtrain.progress import Progress
from jaxtrain.sharding.partition import named_sharding
from jaxtrain.sharding.rules import ShardingRules
from jaxtrain.train_state import TrainState

Dataset = Iterable[dict[str, np.ndarray]]

_FAILED_SAVE = ('raise', 'go_on')
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
    num_programs: Programs compiled: initialisation, training step, evaluation.
    tokens_per_s: Positions (padding included) trained on per second, without
      compiling, evaluating and saving; 0 if no step was timed.
    mfu: Model FLOPs utilisation, 0..1; `None` if the peak is not known.
  """

  state: TrainState
  step: int
  history: list[dict[str, float]]
  stopped_by: str | None
  compile_s: float
  num_programs: int
  tokens_per_s: float
  mfu: float | None


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

  def __post_init__(self):
    if self.failed_save not in _FAILED_SAVE:
      raise ValueError(
        f'failed_save={self.failed_save!r} must be one of '
        f'{", ".join(_FAILED_SAVE)}'
      )
    lazy.check_saving(self.saving, self.staging_gib)


class RunFiles:
  """Checkpoints and metrics of a run, or neither without a folder."""

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

  def __enter__(self):
    return self

  def __exit__(self, *error):
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

  def __post_init__(self):
    self.batch_sharding = named_sharding(self.mesh, self.rules, 'batch', 'seq')
    self.compiled = self.eval_step = self.meter = self.batch_shape = None
    self.compile_s, self.num_programs = 0.0, 0
    self.saved_at = self.evaluated_at = None
    self.history, self.window = [], []

  def start(self, dataset: Dataset, seed: int) -> None:
    """Makes the first state, or reads the newest checkpoint that is whole."""
    self.iterator = iter(dataset)
    checkpoints = self.files.checkpoints
    found = None
    if checkpoints:
      checkpoints.claim()
      if checkpoints.all_steps():
        spec = train_state_lib.state_spec(
          self.model, self.tx, self.mesh, self.rules
        )
        found = checkpoints.resume(vars(spec.abstract))
    if found is None:
      self.step = 0
      self.state = train_state_lib.init_state(
        self.model, self.tx, self.mesh, self.rules, seed=seed
      )
      self.num_programs += 1
    else:
      self.step = self.saved_at = found.step
      self.state = TrainState(**found.state)
      self._forward_data(found.data_state)
      self.window = found.metadata.get(_LOOP, {}).get('window', [])
      if 'eval_loss' in checkpoints.metrics(self.step):
        self.evaluated_at = self.step
      for damage in found.damaged:
        self.shown.say(f'WARNING: {damage}')
      self.shown.say(f'resumed from step {self.step} of {self.files.workdir}')
    self.shown.start(self.step)

  def _forward_data(self, data_state):
    if data_state is not None:
      self.iterator.set_state(data_state)
      return
    for _ in range(self.step):
      next(self.iterator)

  def loop(self, stop: StopSignal) -> str | None:
    """Makes the steps; returns why it ended early, or `None`."""
    ahead = None
    while self.step < self.steps:
      batch = next(self.iterator, None)
      if batch is None:
        self._read(ahead)
        return 'data'
      metrics = self._step(batch, stop.flags(self.mesh))
      behind, ahead = ahead, _Dispatched(self.step, metrics, batch)
      stopped = self._read(behind)
      if stopped or self._is_evaluation_due() or self._is_save_due():
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
    self._read(ahead)
    return None

  def finish(self, stopped_by: str | None) -> None:
    """Evaluates, unless time is short, and saves the last step."""
    if self.window and stopped_by in (None, 'data'):
      self._log(self.step)  # Else the run that goes on has the whole window.
    if self.evaluation and self.evaluated_at != self.step:
      if stopped_by in (None, 'data'):
        self._evaluate()
    self._save(force=True)

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
    )

  def _step(self, batch, flags):
    """Dispatches one step; compiles it if it is the first."""
    arrays = distributed.global_batch(batch, self.batch_sharding)
    shape = arrays['tokens'].shape
    if self.compiled is None:
      self.compiled = self._compile_step(arrays, flags)
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

  def _compile_step(self, arrays, flags):
    """`(state, arrays, flags) -> (state, metrics)`, of one program or two."""
    shardings = jax.tree.map(lambda x: x.sharding, self.state)
    jit = functools.partial(
      jax.jit,
      donate_argnums=0,
      out_shardings=(shardings, NamedSharding(self.mesh, P())),
    )
    if not isinstance(self.step_fn, train_step_lib.SplitStep):
      step = jit(with_stop(self.step_fn))
      return self._compile('step', step, self.state, arrays, flags)
    split, checkpoints = self.step_fn, self.files.checkpoints
    gradients = self._compile('gradients', split.gradients, self.state, arrays)
    found = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      jax.eval_shape(split.gradients, self.state, arrays),
      gradients.output_shardings,
    )
    update = self._compile(
      'update', jit(with_stop(split.update)), self.state, found, flags
    )

    def advance(state, arrays, flags):
      found = gradients(state, arrays)
      if checkpoints is not None:
        checkpoints.wait_copied()
      return update(state, found, flags)

    return advance

  def _compile(self, name, function, *args):
    start = time.perf_counter()
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
    metrics = {k: float(v) for k, v in dispatched.metrics.items()}
    stop = bool(metrics.pop('stop'))
    self.meter.step()
    self.shown.step()
    if not metrics.pop('finite'):
      raise NonFiniteError(self._describe(dispatched, metrics))
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
    self._note(step, means | rates)

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
    # The last step is saved by `finish`, evaluated.
    return bool(
      checkpoints
      and self.step < self.steps
      and checkpoints.should_save(self.step)
    )

  def _evaluate(self):
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
    values = evaluate(
      self.eval_step,
      self.state.params,
      e.dataset,
      self.batch_sharding,
      e.batches,
    )
    self.evaluated_at = self.step
    self._note(self.step, values)

  def _save(self, force):
    checkpoints = self.files.checkpoints
    if checkpoints is None or self.saved_at == self.step:
      return
    if not (force or self._is_save_due()):
      return
    get_state = getattr(self.iterator, 'get_state', None)
    # What has been measured since the last row of metrics.
    loop = {'window': self.window}
    try:
      checkpoints.save(
        self.step,
        vars(self.state),
        data_state=get_state() if get_state else None,
        config=self.model.config,
        metadata={**(self.metadata or {}), _LOOP: loop},
        metrics=self._measured(),
        force=force,
      )
    except SaveError as e:
      if self.files.saves.failed_save == 'raise' or self.step == self.steps:
        raise
      self.shown.say(f'WARNING: training goes on without a checkpoint: {e}')
      return
    self.saved_at = self.step

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
