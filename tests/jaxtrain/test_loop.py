"""Resuming changes nothing, and what goes wrong is named."""

import functools
import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import optax
import pytest

from jaxtrain import goodput
from jaxtrain import heartbeat
from jaxtrain import loop
from jaxtrain import metrics as metrics_lib
from jaxtrain.checkpoints.in_memory.keeper import Keeper
from jaxtrain.checkpoints.in_memory.snapshots import InMemorySnapshots
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.heartbeat import Heartbeat
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import make_mesh

_B, _T, _V = 8, 16, 32
_CONFIG = ModelConfig(
  vocab_size=_V,
  embed_dim=16,
  num_layers=2,
  num_heads=2,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=32,
  max_seq_len=_T,
)
_MESHES = ('', 'data=2,fsdp=2,tensor=2')


class _Batches:
  """Random batches whose iterator can be saved; optionally spoilt or ending."""

  def __init__(self, bad=None, count=10**9, seed=0):
    self.bad, self.count, self.seed = bad, count, seed

  def __iter__(self):
    return _Iterator(self)


class _Iterator:
  def __init__(self, batches):
    self._batches, self._index = batches, 0

  def __iter__(self):
    return self

  def __next__(self):
    if self._index >= self._batches.count:
      raise StopIteration
    rng = np.random.default_rng((self._batches.seed, self._index))
    tokens = rng.integers(0, _V, (_B, _T + 1)).astype(np.int32)
    weights = np.ones((_B, _T), np.float32)
    if self._index == self._batches.bad:
      weights[:] = np.nan
    self._index += 1
    return dict(
      tokens=tokens[:, :-1],
      targets=tokens[:, 1:],
      positions=np.tile(np.arange(_T, dtype=np.int32), (_B, 1)),
      segment_ids=np.ones((_B, _T), np.int32),
      weights=weights,
    )

  def get_state(self):
    return {'index': self._index}

  def set_state(self, state):
    self._index = state['index']


def _train(spec='', dataset=None, **kwargs):
  defaults = dict(
    mesh=make_mesh(spec),
    rules=PRESETS['default'],
    steps=10,
    log_every=1,
    progress=False,
  )
  return loop.train(
    Transformer(_CONFIG),
    optax.adamw(1e-2),
    _Batches() if dataset is None else dataset,
    **{**defaults, **kwargs},
  )


@functools.cache
def _straight(spec):
  return _train(spec)


def _losses(result):
  return [row['loss'] for row in result.history]


def _assert_same_state(a, b):
  jax.tree.map(np.testing.assert_array_equal, a.state, b.state)


@pytest.mark.parametrize('spec', _MESHES)
def test_resumed_run_is_bit_exact(spec, tmp_path):
  straight = _straight(spec)
  first = _train(spec, workdir=tmp_path, steps=5)
  # The seed of the second call is not used: the state has its own.
  second = _train(spec, workdir=tmp_path, steps=10, seed=99)
  assert (first.step, second.step) == (5, 10)
  assert _losses(first) + _losses(second) == _losses(straight)
  _assert_same_state(second, straight)
  rows = metrics_lib.read(tmp_path)
  assert [r['step'] for r in rows] == list(range(1, 11))
  assert [r['loss'] for r in rows] == _losses(straight)


def test_same_losses_on_one_device_and_on_the_mesh():
  one, mesh = (_losses(_straight(spec)) for spec in _MESHES)
  np.testing.assert_allclose(one, mesh, atol=1e-5)
  assert one[-1] < one[0]


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_the_same_call_goes_on(number, tmp_path):
  class Interrupting(_Iterator):
    def __iter__(self):
      return Interrupting(_Batches())

    def __next__(self):
      if self._index == 3:
        os.kill(os.getpid(), number)
      return super().__next__()

  stopped = _train(dataset=Interrupting(None), workdir=tmp_path)
  assert stopped.stopped_by == signal.Signals(number).name
  assert 3 <= stopped.step <= 6
  resumed = _train(workdir=tmp_path)
  assert resumed.stopped_by is None
  _assert_same_state(resumed, _straight(''))
  assert _losses(stopped) + _losses(resumed) == _losses(_straight(''))


def test_non_finite_loss_names_step_batch_and_checkpoint(tmp_path):
  with pytest.raises(loop.NonFiniteError) as error:
    _train(dataset=_Batches(bad=6), workdir=tmp_path, save_every=3)
  message = str(error.value)
  assert 'step 7 is not finite' in message and 'loss=nan' in message
  assert 'last good checkpoint: step 6' in message
  (path,) = tmp_path.glob('non_finite_*.npz')
  assert str(path) in message
  assert np.isnan(np.load(path)['weights']).all()
  with CheckpointManager(tmp_path / 'checkpoints') as manager:
    assert manager.all_steps() == [3, 6]
  # With the batch mended the run goes on from the good checkpoint.
  _assert_same_state(_train(workdir=tmp_path), _straight(''))


def test_non_finite_without_workdir():
  with pytest.raises(loop.NonFiniteError, match='step 1 .*Without a workdir'):
    _train(dataset=_Batches(bad=0))


def test_data_that_ends(tmp_path):
  result = _train(dataset=_Batches(count=4), workdir=tmp_path)
  assert (result.step, result.stopped_by) == (4, 'data')
  assert _losses(result) == _losses(_straight(''))[:4]
  with CheckpointManager(tmp_path / 'checkpoints') as manager:
    assert manager.latest_step() == 4


def test_iterator_without_state_is_run_forward(tmp_path):
  plain = lambda: (
    batch for batch in iter(_Batches().__iter__().__next__, None)
  )
  _train(dataset=plain(), workdir=tmp_path, steps=4)
  resumed = _train(dataset=plain(), workdir=tmp_path)
  _assert_same_state(resumed, _straight(''))


def test_finished_run_does_nothing_more(tmp_path):
  first = _train(workdir=tmp_path, steps=2)
  again = _train(workdir=tmp_path, steps=2)
  assert again.step == 2 and again.history == []
  _assert_same_state(again, first)


def test_evaluation_rows_and_rates(tmp_path):
  evaluation = _Batches(seed=1, count=3)
  result = _train(
    workdir=tmp_path,
    eval_dataset=evaluation,
    eval_every=4,
    eval_batches=2,
    log_every=3,
  )
  assert [r['step'] for r in result.history] == [3, 4, 6, 8, 9, 10]
  evaluated = {r['step']: r for r in result.history if 'eval_loss' in r}
  assert list(evaluated) == [4, 8, 10]
  assert 0 < evaluated[10]['eval_loss'] < 2 * np.log(_V)
  means = [np.mean(_losses(_straight(''))[i : i + 3]) for i in (0, 3, 6)]
  got = [r['loss'] for r in result.history if r['step'] % 3 == 0]
  np.testing.assert_allclose(got, means, rtol=1e-6)
  # The window after the last full one.
  assert result.history[-1]['loss'] == _losses(_straight(''))[-1]
  assert result.tokens_per_s > 0 and 0 < result.mfu < 10
  assert result.num_programs == 3 and result.compile_s > 0
  assert (tmp_path / 'tensorboard').is_dir()


def test_time_is_sorted_into_categories(tmp_path):
  start = time.perf_counter()
  first = _train(
    workdir=tmp_path,
    steps=6,
    save_every=3,
    dataset=_Batches(count=5),
    eval_dataset=_Batches(seed=1),
    eval_every=3,
    eval_batches=1,
  )
  elapsed = time.perf_counter() - start
  spent = {name for name, s in first.goodput.items() if s > 0}
  assert spent == {
    *('step', 'data', 'checkpoint', 'evaluation', 'compile', 'start', 'other')
  }
  assert 0.5 * elapsed < sum(first.goodput.values()) <= elapsed
  assert first.goodput['compile'] == pytest.approx(first.compile_s, rel=0.1)
  # The run that was killed after step 5 has saved step 3.
  (line,) = (tmp_path / 'goodput.jsonl').read_text().splitlines()
  killed = {**json.loads(line), 'ended': None}
  (tmp_path / 'goodput.jsonl').write_text(json.dumps(killed) + '\n')
  shutil.rmtree(tmp_path / 'checkpoints' / '00000005')
  second = _train(workdir=tmp_path, steps=8)
  assert second.goodput['lost'] > 0 and second.goodput['step'] > 0
  record = goodput.read(tmp_path)
  assert [i.lost_steps for i in record.incarnations] == [0, 2]
  assert record.seconds['step'] > first.goodput['step']
  for row in metrics_lib.read(tmp_path):
    parts = [v for name, v in row.items() if name.startswith('goodput/')]
    assert len(parts) == len(goodput.CATEGORIES)
    assert sum(parts) == pytest.approx(1)


def test_waiting_for_data_is_data(tmp_path):
  class Slow(_Batches):
    def __iter__(self):
      for i, batch in enumerate(_Batches()):
        time.sleep(0.2 if i == 3 else 0)
        yield batch

  seconds = _train(dataset=Slow()).goodput
  # A step on the device hides some of it.
  assert 0.1 < seconds['data'] < 0.3


class _Dying(_Batches):
  """An error instead of the eighth batch."""

  def __iter__(self):
    class Dying(_Iterator):
      def __next__(self):
        if self._index == 7:
          raise OSError('the disk is gone')
        return super().__next__()

    return Dying(self)


@pytest.fixture
def keepers():
  keepers = [Keeper() for _ in range(2)]
  yield [k.address for k in keepers]
  for keeper in keepers:
    keeper.close()


def test_goes_on_from_the_newest_of_memory_and_storage(tmp_path, keepers):
  spec = _MESHES[1]

  def train(**options):
    with InMemorySnapshots(keepers) as snapshots:
      options = dict(snapshots=snapshots, snapshot_every=2) | options
      return _train(spec, workdir=tmp_path, save_every=3, **options)

  with pytest.raises(OSError, match='the disk'):
    train(dataset=_Dying())
  with CheckpointManager(tmp_path / 'checkpoints') as manager:
    assert manager.all_steps() == [3, 6]
  with InMemorySnapshots(keepers) as snapshots:
    assert snapshots.steps() == [4, 6]
  # Of the same step, memory.
  shutil.rmtree(tmp_path / 'checkpoints' / '00000006')
  result = train(steps=9)
  assert [r['step'] for r in result.history] == [7, 8, 9]
  # Storage has step 9, memory 8.
  result = train()
  assert [r['step'] for r in result.history] == [10]
  _assert_same_state(result, _straight(spec))


def test_a_supervisor_is_told(tmp_path):
  path = tmp_path / 'beat.json'
  phases = []

  class Watched(_Batches):
    def __iter__(self):
      for batch in _Batches():
        phases.append(beat._beat.phase)
        yield batch

  with Heartbeat(path, fingerprint_every=4) as beat:
    result = _train(_MESHES[1], dataset=Watched(), heartbeat=beat)
  seen = heartbeat.read(path)
  assert (seen.first_step, seen.step, seen.ended) == (0, 10, 'steps')
  assert set(phases) == {'data'} and seen.phase == 'start'
  assert list(seen.fingerprints) == [4, 8]
  # The parameters are not split along `data`: each group has two devices.
  for groups in seen.fingerprints.values():
    assert len(groups) == 4
    assert all(len(sums) == 1 for sums in groups.values())
  assert seen.fingerprints[4] != seen.fingerprints[8]
  assert result.num_programs == 3
  _assert_same_state(result, _straight(_MESHES[1]))


def test_a_supervisor_is_told_of_errors(tmp_path):
  with pytest.raises(loop.NonFiniteError):
    beat = Heartbeat(tmp_path / 'beat.json')
    _train(dataset=_Batches(bad=2), heartbeat=beat)
  seen = heartbeat.read(tmp_path / 'beat.json')
  assert (seen.step, seen.ended, seen.error) == (2, None, 'NonFiniteError')


def test_nothing_compiles_after_the_first_step():
  compiled = []
  event = '/jax/core/compile/backend_compile_duration'

  def listen(name, *args, **kwargs):
    if name == event:
      compiled.append(watching[0])

  watching = [False]

  class Watched(_Batches):
    def __iter__(self):
      for i, batch in enumerate(_Batches()):
        watching[0] = i >= 2
        yield batch

  jax.monitoring.register_event_duration_secs_listener(listen)
  _train(dataset=Watched())
  watching[0] = False
  assert compiled and not any(compiled)


def test_batches_that_change_shape():
  def batches():
    yield from [next(iter(_Batches()))] * 2
    yield {k: v[:4] for k, v in next(iter(_Batches())).items()}

  with pytest.raises(ValueError, match=r'step 3: a batch of shape \(4, 16\)'):
    _train(dataset=batches())


@pytest.mark.parametrize(
  'options, message',
  [
    (dict(steps=0), 'steps=0'),
    (dict(log_every=0), 'log_every=0'),
    (dict(accumulation=0), 'accumulation=0'),
    (dict(spec='data=3'), 'does not divide'),
  ],
)
def test_wrong_arguments(options, message):
  with pytest.raises(ValueError, match=message):
    _train(**options)


def test_checkpoint_of_another_model_is_refused(tmp_path):
  _train(workdir=tmp_path, steps=1)
  other = Transformer(ModelConfig(**{**vars(_CONFIG), 'mlp_dim': 48}))
  with pytest.raises(ValueError, match='mlp'):
    loop.train(
      other,
      optax.adamw(1e-2),
      _Batches(),
      mesh=make_mesh(),
      rules=PRESETS['default'],
      steps=2,
      workdir=tmp_path,
      progress=False,
    )
