r"""What a snapshot of every step in the memory of keepers costs.

python -m experiments.benchmarks.in_memory_snapshots
python -m experiments.benchmarks.in_memory_snapshots --num_parity=2 --rounds=9

Three measurements, all on this machine, keepers in processes of their own:

* parity: bytes of data encoded and decoded per CPU second, beside those of
  `memcpy`, taking turns;
* steps: training steps of a small Llama with and without a snapshot after each
  one, rounds taking turns; ratios of the median seconds of a step, and of the
  CPU seconds of the trainer and all keepers;
* restore: the last state back from the keepers and from a checkpoint on disk
  that is still in the page cache, taking turns; then from the keepers with
  `num_parity` of them killed.

Whatever is decoded or restored must equal what was encoded or saved, bit for
bit. The trainer and all keepers share the machine's cores here; on a cluster
each host has one keeper and its trainer computes elsewhere.
"""

import json
import os
import pathlib
import platform
import statistics
import tempfile
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtrain import train_state
from jaxtrain import train_step
from jaxtrain.checkpoints.in_memory import parity
from jaxtrain.checkpoints.in_memory.keeper import KeeperProcess
from jaxtrain.checkpoints.in_memory.snapshots import InMemorySnapshots
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import make_mesh

_RESULTS = pathlib.Path(__file__).parent / 'results'
_KEEPERS = flags.DEFINE_integer('keepers', 4, 'Processes.', lower_bound=2)
_PARITY = flags.DEFINE_integer('num_parity', 1, 'Rows of parity.')
_BATCH = flags.DEFINE_integer('batch_size', 8, 'Rows.')
_SEQ_LEN = flags.DEFINE_integer('seq_len', 256, 'Tokens per row.')
_WIDTH = flags.DEFINE_integer('embed_dim', 256, 'A multiple of 64.')
_STEPS = flags.DEFINE_integer('steps', 4, 'Steps of a round.')
_ROUNDS = flags.DEFINE_integer('rounds', 7, 'Turns.', lower_bound=1)
_OUTPUT = flags.DEFINE_string(
  'output', str(_RESULTS / 'in_memory_snapshots_cpu.json'), 'JSON.'
)

_CHUNK_BYTES = 1 << 24
_TICKS_PER_S = os.sysconf('SC_CLK_TCK')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  results = {'parity': _time_parity()}
  keepers = [KeeperProcess(idle_exit_s=600) for _ in range(_KEEPERS.value)]
  try:
    trainer = _Trainer()
    results['steps'] = _time_steps(trainer, keepers)
    results['restore'] = _time_restore(trainer, keepers)
  finally:
    for keeper in keepers:
      keeper.kill()
  record = dict(
    benchmark='in_memory_snapshots',
    keepers=_KEEPERS.value,
    num_parity=_PARITY.value,
    batch_size=_BATCH.value,
    seq_len=_SEQ_LEN.value,
    cores=os.cpu_count(),
    machine=platform.machine(),
    jax=jax.__version__,
    **results,
  )
  print(json.dumps(results, indent=2))
  if _OUTPUT.value:
    pathlib.Path(_OUTPUT.value).write_text(json.dumps(record, indent=2) + '\n')


def _time_parity():
  k = _KEEPERS.value - 1
  rng = np.random.default_rng(0)
  chunks = list(rng.integers(0, 256, (k, _CHUNK_BYTES), dtype=np.uint8))
  into = np.empty_like(chunks[0])
  num_bytes = k * _CHUNK_BYTES

  def copy():
    for chunk in chunks:
      np.copyto(into, chunk)

  contenders = {'memcpy': copy}
  for m in (1, 2, 3):
    parts = dict(enumerate(chunks + parity.encode(chunks, m)))
    # The worst: as many chunks of data lost as there are rows of parity.
    known = {i: x for i, x in parts.items() if i >= m or i >= k}
    for j, x in parity.decode(known, k, m).items():
      np.testing.assert_array_equal(x, chunks[j])
    contenders[f'encode_{m}'] = lambda m=m: parity.encode(chunks, m)
    contenders[f'decode_{m}'] = lambda m=m, known=known: parity.decode(
      known, k, m
    )
  rates = {name: [] for name in contenders}
  for _ in range(_ROUNDS.value):
    for name, call in contenders.items():
      start = time.thread_time()
      call()
      rates[name].append(num_bytes / (time.thread_time() - start) / 1e9)
  return {f'{n}_gb_per_cpu_s': _median(r) for n, r in rates.items()}


class _Trainer:
  """A model, its state, and a step of it."""

  def __init__(self):
    width = _WIDTH.value
    config = ModelConfig(
      family='llama',
      vocab_size=8192,
      embed_dim=width,
      num_layers=4,
      num_heads=width // 64,
      num_kv_heads=width // 64,
      head_dim=64,
      mlp_dim=8 * width // 3 // 8 * 8,
      max_seq_len=_SEQ_LEN.value,
    )
    model, tx = Transformer(config), optax.adamw(1e-3)
    mesh, rules = make_mesh(), PRESETS['default']
    self.state = train_state.init_state(model, tx, mesh, rules)
    self.abstract = vars(
      train_state.state_spec(model, tx, mesh, rules).abstract
    )
    self._step = train_step.make_train_step(model, tx, mesh, rules)
    rng = np.random.default_rng(0)
    shape = (_BATCH.value, _SEQ_LEN.value)
    tokens = rng.integers(0, 8192, (shape[0], shape[1] + 1), np.int32)
    self._batch = dict(
      tokens=jnp.asarray(tokens[:, :-1]),
      targets=jnp.asarray(tokens[:, 1:]),
      positions=jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape),
      segment_ids=jnp.ones(shape, jnp.int32),
      weights=jnp.ones(shape, jnp.float32),
    )
    self.num_steps = 0

  def snapshot(self, snapshots):
    """One more snapshot, whole when this returns."""
    self.num_steps += 1
    snapshots.save(self.num_steps, vars(self.state))
    snapshots.wait()

  def num_bytes(self):
    """Of the state."""
    return sum(x.nbytes for x in jax.tree.leaves(vars(self.state)))

  def step(self, snapshots):
    """Seconds of a step, and of starting its snapshot."""
    start = time.perf_counter()
    self.state, metrics = self._step(self.state, self._batch)
    self.num_steps += 1
    if snapshots is not None:
      snapshots.save(self.num_steps, vars(self.state))
    if not np.isfinite(float(metrics['nll'])):
      raise AssertionError('the loss is not finite')
    return time.perf_counter() - start


def _time_steps(trainer, keepers):
  addresses = [k.address for k in keepers]
  with InMemorySnapshots(addresses, _PARITY.value) as snapshots:
    for which in (None, snapshots):  # Compiles, and makes the memory.
      for _ in range(3):
        trainer.step(which)
    snapshots.wait()
    snapshots.blocked_s = 0.0
    seconds = {'without': [], 'with': []}
    cpu = {'without': [], 'with': []}
    for _ in range(_ROUNDS.value):
      for name, which in (('without', None), ('with', snapshots)):
        before = time.process_time(), _cpu_seconds(keepers)
        seconds[name] += [trainer.step(which) for _ in range(_STEPS.value)]
        snapshots.wait()
        after = time.process_time(), _cpu_seconds(keepers)
        cpu[name].append(np.subtract(after, before) / _STEPS.value)
    count = len(seconds['with'])
    if snapshots.failed or snapshots.absent or snapshots.saved != count + 3:
      raise AssertionError(f'{snapshots.failed} snapshots failed')
    alone = [
      _seconds(lambda: trainer.snapshot(snapshots))
      for _ in range(_ROUNDS.value)
    ]
  medians = {f'{k}_s': _median(v) for k, v in seconds.items()}
  cpu_s = {k: np.median(v, axis=0) for k, v in cpu.items()}
  return dict(
    state_bytes=trainer.num_bytes(),
    **medians,
    ratio=round(medians['with_s'] / medians['without_s'], 3),
    trainer_cpu_without_s=round(cpu_s['without'][0], 3),
    trainer_cpu_with_s=round(cpu_s['with'][0], 3),
    keepers_cpu_s=round(cpu_s['with'][1], 3),
    cpu_ratio=round(cpu_s['with'].sum() / cpu_s['without'].sum(), 3),
    blocked_s_per_step=round(snapshots.blocked_s / count, 4),
    snapshot_alone_s=_median(alone),
  )


def _time_restore(trainer, keepers):
  addresses = [k.address for k in keepers]
  want = jax.tree.map(np.asarray, vars(trainer.state))

  def check(state):
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(want), strict=True):
      if np.asarray(a).tobytes() != b.tobytes():
        raise AssertionError('what was restored is not what was saved')

  with tempfile.TemporaryDirectory() as folder:
    with (
      CheckpointManager(folder) as manager,
      InMemorySnapshots(addresses, _PARITY.value) as snapshots,
    ):
      manager.save(trainer.num_steps, vars(trainer.state))
      manager.wait()
      sources = {'memory': snapshots, 'storage': manager}
      seconds = {name: [] for name in (*sources, 'memory_after_losses')}
      for _ in range(_ROUNDS.value):
        for name, source in sources.items():
          seconds[name].append(_time_one(source, trainer, check))
      for keeper in keepers[: _PARITY.value]:
        keeper.kill()
      for _ in range(_ROUNDS.value):
        seconds['memory_after_losses'].append(
          _time_one(snapshots, trainer, check)
        )
  return {f'{name}_s': _median(v) for name, v in seconds.items()}


def _time_one(source, trainer, check):
  start = time.perf_counter()
  state = jax.block_until_ready(source.restore(trainer.abstract)[0])
  seconds = time.perf_counter() - start
  check(state)
  return seconds


def _cpu_seconds(keepers):
  """User and system time of all keepers; Linux."""
  ticks = 0
  for keeper in keepers:
    stat = pathlib.Path(f'/proc/{keeper.process.pid}/stat').read_text()
    user, system = stat.rpartition(')')[2].split()[11:13]
    ticks += int(user) + int(system)
  return ticks / _TICKS_PER_S


def _seconds(call):
  start = time.perf_counter()
  call()
  return time.perf_counter() - start


def _median(values):
  return round(statistics.median(values), 4)


if __name__ == '__main__':
  app.run(main)
