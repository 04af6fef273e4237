r"""What a checkpoint costs a training run: orbax's two ways, and lazy saves.

python -m experiments.benchmarks.checkpoint_saves
python -m experiments.benchmarks.checkpoint_saves --quick --output=/tmp/s.json

A Llama of 85 M parameters with AdamW, 1 GB of float32 state, on this host's
disk. Contenders take turns in one process, on one state:

* no saves, of one program a step or of two (`make_split_step`);
* orbax's `CheckpointManager` as it comes, synchronous and asynchronous;
* `CheckpointManager(saving='lazy')`.

First one save at a time. Blocked is how long the training thread is kept from
dispatching: the call of save, from when the state is computed, and for lazy
saves the wait before the update too. Then a step, which must donate the state,
while what is written in the background is written. Then whole runs that save
after every step as `jaxtrain.run` does: the step is known to be finite before
its state is saved. Without saves the host is one step ahead.

Every run's last checkpoint is restored and must equal the state bit for bit.
The floor is measured too: a copy of the state in memory (into fresh pages and
into warm ones) and a file of its size, written and synced.
"""

from collections.abc import Callable
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time

from absl import app
from absl import flags
from absl import logging
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import tqdm

from jaxtrain import train_state as train_state_lib
from jaxtrain import train_step as train_step_lib
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import make_mesh

_RESULTS = pathlib.Path(__file__).parent / 'results' / 'checkpoint_saves.json'
_CONTENDERS = ('one program', 'two programs', 'sync', 'async', 'lazy')
_EMBED_DIM = flags.DEFINE_integer(
  'embed_dim', 704, 'D, of 12 layers; a multiple of 64.', lower_bound=64
)
_TOKENS = flags.DEFINE_integer('tokens', 2048, 'Per step.', lower_bound=128)
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Turns of one save.', lower_bound=1)
_STEPS = flags.DEFINE_integer('steps', 50, 'Of a whole run.', lower_bound=2)
_RUNS = flags.DEFINE_integer('runs', 1, 'Turns of whole runs.', lower_bound=0)
_IN_RUNS = flags.DEFINE_list(
  'in_runs', ['sync', 'async', 'lazy'], 'Contenders of whole runs.'
)
_STAGING = flags.DEFINE_float(
  'staging_gib', None, 'Host memory of lazy saves; half of what is free.'
)
_QUICK = flags.DEFINE_bool(
  'quick', False, 'A quarter of the tokens, 3 turns, whole runs of 6 steps.'
)
_DIRECTORY = flags.DEFINE_string(
  'directory', None, 'Where to write; a new one.'
)
_OUTPUT = flags.DEFINE_string('output', str(_RESULTS), 'JSON.')
_SEQ_LEN = 128


class _Orbax:
  """Orbax's manager as it comes, `options` apart."""

  def __init__(self, directory, **options):
    options = ocp.CheckpointManagerOptions(max_to_keep=2, **options)
    self._manager = ocp.CheckpointManager(directory, options=options)
    self.wait, self.close = (
      self._manager.wait_until_finished,
      self._manager.close,
    )
    self.waited_s = 0.0

  def save(self, step, state):
    # What is saved is known to be finite; so the state is there.
    jax.block_until_ready(state)
    began = time.perf_counter()
    self._manager.save(step, args=ocp.args.PyTreeSave(vars(state)))
    return time.perf_counter() - began

  def wait_copied(self):
    pass

  def restore(self, state):
    wanted = jax.tree.map(_struct, vars(state))
    return self._manager.restore(
      self._manager.latest_step(),
      args=ocp.args.PyTreeRestore(
        wanted, ocp.checkpoint_utils.construct_restore_args(wanted)
      ),
    )


class _Lazy:
  """Ours."""

  def __init__(self, directory):
    self._manager = CheckpointManager(
      directory, keep=2, saving='lazy', staging_gib=_STAGING.value
    )
    self.wait, self.close = self._manager.wait, self._manager.close
    self.waited_s = 0.0

  def save(self, step, state):
    began = time.perf_counter()
    self._manager.save(step, vars(state))
    return time.perf_counter() - began

  def wait_copied(self):
    began = time.perf_counter()
    self._manager.wait_copied()
    self.waited_s += time.perf_counter() - began

  def restore(self, state):
    return self._manager.restore(jax.tree.map(_struct, vars(state)))[0]


class _Nothing:
  """No saves."""

  waited_s = 0.0

  def __init__(self, directory):
    del directory

  def save(self, step, state):
    del step, state
    return 0.0

  def wait_copied(self):
    pass

  wait = close = wait_copied


_SAVERS: dict[str, Callable] = {
  'one program': _Nothing,
  'two programs': _Nothing,
  'sync': lambda d: _Orbax(d, enable_async_checkpointing=False),
  'async': _Orbax,
  'lazy': _Lazy,
}


class _Training:
  """One state, and both kinds of steps."""

  def __init__(self):
    d = _EMBED_DIM.value
    config = ModelConfig(
      family='llama',
      vocab_size=25 * d,
      embed_dim=d,
      num_layers=12,
      num_heads=d // 64,
      num_kv_heads=d // 64,
      head_dim=64,
      mlp_dim=d * 11 // 4,
      max_seq_len=_SEQ_LEN,
      tie_embeddings=True,
    )
    mesh, rules = make_mesh('data=1'), PRESETS['default']
    model, tx = Transformer(config), optax.adamw(1e-4)
    self._fused = train_step_lib.make_train_step(model, tx, mesh, rules)
    self._split = train_step_lib.make_split_step(model, tx, mesh, rules)
    self.state = train_state_lib.init_state(model, tx, mesh, rules)
    self.num_bytes = sum(x.nbytes for x in jax.tree.leaves(self.state))
    self.num_params = sum(x.size for x in jax.tree.leaves(self.state.params))
    shape = (_tokens() // _SEQ_LEN, _SEQ_LEN)
    tokens = np.random.default_rng(0).integers(
      0, config.vocab_size, shape, np.int32
    )
    self._batch = dict(
      tokens=tokens,
      targets=tokens,
      positions=np.broadcast_to(np.arange(_SEQ_LEN, dtype=np.int32), shape),
      segment_ids=np.ones(shape, np.int32),
      weights=np.ones(shape, np.float32),
    )

  def step(self, name, saver):
    """Dispatches one step; returns its metrics."""
    if name in ('lazy', 'two programs'):
      found = self._split.gradients(self.state, self._batch)
      saver.wait_copied()
      self.state, metrics = self._split.update(self.state, found)
    else:
      self.state, metrics = self._fused(self.state, self._batch)
    return metrics


def _one_save(training, name, directory, number):
  """Seconds of one save, of the step after it, and until it is on disk."""
  with tempfile.TemporaryDirectory(dir=directory) as folder:
    saver = _SAVERS[name](folder)
    # The step before, so that every contender begins alike.
    metrics = training.step(name, saver)
    jax.block_until_ready((training.state, metrics))
    began = time.perf_counter()
    blocked = saver.save(number, training.state)
    saved = time.perf_counter()
    metrics = training.step(name, saver)
    jax.block_until_ready((training.state, metrics))
    stepped = time.perf_counter()
    saver.wait()
    written = time.perf_counter()
    saver.close()
  assert float(metrics['finite']) == 1
  return dict(
    blocked_s=blocked + saver.waited_s,
    step_s=stepped - saved,
    total_s=stepped - began,
    written_s=written - began,
  )


def _whole_run(training, name, directory, steps):
  """Seconds of `steps` steps with a save after each; checks the last."""
  with tempfile.TemporaryDirectory(dir=directory) as folder:
    saver = _SAVERS[name](folder)
    blocked, ahead = [], None
    began = time.perf_counter()
    for i in tqdm.trange(steps, desc=name, leave=False):
      before = saver.waited_s
      metrics = training.step(name, saver)
      if blocked:
        blocked[-1] += saver.waited_s - before
      behind, ahead = ahead, metrics
      known = behind if isinstance(saver, _Nothing) else metrics
      assert known is None or float(known['finite']) == 1
      blocked.append(saver.save(i, training.state))
    jax.block_until_ready((training.state, ahead))
    stepped = time.perf_counter()
    saver.wait()
    written = time.perf_counter()
    if not isinstance(saver, _Nothing):
      found = saver.restore(training.state)
      jax.tree.map(np.testing.assert_array_equal, found, vars(training.state))
    saver.close()
  return dict(
    steps_s=stepped - began,
    written_s=written - began,
    blocked_s=statistics.median(blocked),
  )


def _struct(x):
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _floor(num_bytes, directory):
  """Seconds to copy as much in memory, and to write it to a file."""
  source = np.ones(num_bytes, np.uint8)
  seconds = {}
  for name in ('copy_fresh_s', 'copy_warm_s'):
    began = time.perf_counter()
    if name == 'copy_fresh_s':
      target = np.empty_like(source)
    np.copyto(target, source)
    seconds[name] = time.perf_counter() - began
  with tempfile.TemporaryDirectory(dir=directory) as folder:
    began = time.perf_counter()
    with open(os.path.join(folder, 'file'), 'wb') as f:
      f.write(source.data)
      seconds['write_s'] = time.perf_counter() - began
      os.fsync(f.fileno())
      seconds['write_and_sync_s'] = time.perf_counter() - began
  return seconds


def _tokens():
  return _TOKENS.value // 4 if _QUICK.value else _TOKENS.value


def _rounds():
  return min(_ROUNDS.value, 3) if _QUICK.value else _ROUNDS.value


def _steps():
  return min(_STEPS.value, 6) if _QUICK.value else _STEPS.value


def _turns(names, count):
  """`count` rounds of all names, each round beginning with another."""
  for i in range(count):
    yield from names[i % len(names) :] + names[: i % len(names)]


def _summary(rows):
  """`{key: {median, min, max}}` of a list of dicts."""
  return {
    key: dict(
      median=round(statistics.median(r[key] for r in rows), 4),
      min=round(min(r[key] for r in rows), 4),
      max=round(max(r[key] for r in rows), 4),
    )
    for key in rows[0]
  }


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  if _EMBED_DIM.value % 64:
    raise app.UsageError(f'--embed_dim={_EMBED_DIM.value} is no multiple of 64')
  if unknown := set(_IN_RUNS.value) - set(_CONTENDERS[2:]):
    raise app.UsageError(
      f'--in_runs={",".join(unknown)} is not of {", ".join(_CONTENDERS[2:])}'
    )
  logging.set_verbosity(logging.WARNING)  # Orbax says much.
  training, directory = _Training(), _DIRECTORY.value
  load = os.getloadavg()[0]
  for name in ('one program', 'two programs'):  # Compiles.
    training.step(name, _Nothing(None))
  saves = {name: [] for name in _CONTENDERS}
  runs = {name: [] for name in ('two programs', *_IN_RUNS.value)}
  floors = []
  turns = list(_turns(_CONTENDERS, _rounds()))
  for i, name in enumerate(tqdm.tqdm(turns, unit='save')):
    saves[name].append(_one_save(training, name, directory, i))
    if name == 'lazy':
      floors.append(_floor(training.num_bytes, directory))
  # Whole runs take long: what is known already is shown and kept.
  _note(training, saves, runs, floors, load)
  for name in _turns(tuple(runs), _RUNS.value):
    runs[name].append(_whole_run(training, name, directory, _steps()))
  if _RUNS.value:
    _note(training, saves, runs, floors, load)


def _note(training, saves, runs, floors, load):
  """Prints and writes what has been measured."""
  record = dict(
    state_bytes=training.num_bytes,
    parameters=training.num_params,
    tokens_per_step=_tokens(),
    rounds=_rounds(),
    steps=_steps(),
    runs=max(map(len, runs.values())),
    staging_gib=_STAGING.value,
    cores=os.cpu_count(),
    load_before=load,
    load_after=os.getloadavg()[0],
    floor=_summary(floors),
    one_save={k: _summary(v) for k, v in saves.items()},
    whole_run={k: _summary(v) for k, v in runs.items() if v},
    ratios=_ratios(saves, runs),
    versions=dict(
      python=platform.python_version(),
      jax=jax.__version__,
      orbax=ocp.__version__,
    ),
  )
  _print(record)
  pathlib.Path(_OUTPUT.value).write_text(json.dumps(record, indent=1) + '\n')


def _ratios(saves, runs):
  median = lambda rows, key: statistics.median(r[key] for r in rows)
  blocked = {k: median(saves[k], 'blocked_s') for k in ('sync', 'async')}
  lazy = median(saves['lazy'], 'blocked_s')
  ratios = dict(
    blocked_sync_over_lazy=blocked['sync'] / lazy,
    blocked_async_over_lazy=blocked['async'] / lazy,
    # Of the same round.
    step_two_programs_over_one=statistics.median(
      b['step_s'] / a['step_s']
      for a, b in zip(saves['one program'], saves['two programs'], strict=True)
    ),
  )
  for name, rows in runs.items():
    if rows and name != 'two programs':
      ratios[f'run_{name}_over_no_saves'] = statistics.median(
        b['steps_s'] / a['steps_s']
        for a, b in zip(runs['two programs'], rows, strict=True)
      )
  return {k: round(v, 3) for k, v in ratios.items()}


def _print(record):
  show = lambda s: f'{s["median"]:8.3f} ({s["min"]:.3f}..{s["max"]:.3f})'
  print(
    f'{record["parameters"] / 1e6:.1f} M parameters, '
    f'{record["state_bytes"] / 1e9:.2f} GB of state, '
    f'{record["tokens_per_step"]} tokens a step, {record["cores"]} cores, load '
    f'{record["load_before"]:.1f} to {record["load_after"]:.1f}; seconds'
  )
  for part in ('one_save', 'whole_run'):
    for name, row in record[part].items():
      cells = '  '.join(f'{k} {show(v)}' for k, v in row.items())
      print(f'{part:10} {name:13} {cells}')
  cells = '  '.join(f'{k} {show(v)}' for k, v in record['floor'].items())
  print(f'floor      {cells}')
  for name, value in record['ratios'].items():
    print(f'{name:30} {value:.2f}')


if __name__ == '__main__':
  app.run(main)
