"""What the loop does and says, and what goes wrong is named."""

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
from jaxtrain.batch_size.growing import growing
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.heartbeat import Heartbeat
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import make_mesh
from tests.jaxtrain.tiny_run import CONFIG
from tests.jaxtrain.tiny_run import MESHES
from tests.jaxtrain.tiny_run import B
from tests.jaxtrain.tiny_run import Batches
from tests.jaxtrain.tiny_run import Iterator
from tests.jaxtrain.tiny_run import T
from tests.jaxtrain.tiny_run import V
from tests.jaxtrain.tiny_run import assert_same_state
from tests.jaxtrain.tiny_run import losses
from tests.jaxtrain.tiny_run import straight
from tests.jaxtrain.tiny_run import train


def test_same_losses_on_one_device_and_on_the_mesh():
  one, mesh = (losses(straight(spec)) for spec in MESHES)
  np.testing.assert_allclose(one, mesh, atol=1e-5)
  assert one[-1] < one[0]


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_the_same_call_goes_on(number, tmp_path):
  class Interrupting(Iterator):
    def __iter__(self):
      return Interrupting(Batches())

    def __next__(self):
      if self._index == 3:
        os.kill(os.getpid(), number)
      return super().__next__()

  stopped = train(dataset=Interrupting(None), workdir=tmp_path)
  assert stopped.stopped_by == signal.Signals(number).name
  assert 3 <= stopped.step <= 6
  resumed = train(workdir=tmp_path)
  assert resumed.stopped_by is None
  assert_same_state(resumed, straight(''))
  assert losses(stopped) + losses(resumed) == losses(straight(''))


def test_non_finite_loss_names_step_batch_and_checkpoint(tmp_path):
  with pytest.raises(loop.NonFiniteError) as error:
    train(dataset=Batches(bad=6), workdir=tmp_path, save_every=3)
  message = str(error.value)
  assert 'step 7 is not finite' in message and 'loss=nan' in message
  assert 'last good checkpoint: step 6' in message
  (path,) = tmp_path.glob('non_finite_*.npz')
  assert str(path) in message
  assert np.isnan(np.load(path)['weights']).all()
  with CheckpointManager(tmp_path / 'checkpoints') as manager:
    assert manager.all_steps() == [3, 6]
  # With the batch mended the run goes on from the good checkpoint.
  assert_same_state(train(workdir=tmp_path), straight(''))


def test_non_finite_without_workdir():
  with pytest.raises(loop.NonFiniteError, match='step 1 .*Without a workdir'):
    train(dataset=Batches(bad=0))


def test_data_that_ends(tmp_path):
  result = train(dataset=Batches(count=4), workdir=tmp_path)
  assert (result.step, result.stopped_by) == (4, 'data')
  assert losses(result) == losses(straight(''))[:4]
  with CheckpointManager(tmp_path / 'checkpoints') as manager:
    assert manager.latest_step() == 4


def test_iterator_without_state_is_run_forward(tmp_path):
  plain = lambda: (batch for batch in iter(Batches().__iter__().__next__, None))
  train(dataset=plain(), workdir=tmp_path, steps=4)
  resumed = train(dataset=plain(), workdir=tmp_path)
  assert_same_state(resumed, straight(''))


def test_finished_run_does_nothing_more(tmp_path):
  first = train(workdir=tmp_path, steps=2)
  again = train(workdir=tmp_path, steps=2)
  assert again.step == 2 and again.history == []
  assert_same_state(again, first)


def test_evaluation_rows_and_rates(tmp_path):
  evaluation = Batches(seed=1, count=3)
  result = train(
    workdir=tmp_path,
    eval_dataset=evaluation,
    eval_every=4,
    eval_batches=2,
    log_every=3,
  )
  assert [r['step'] for r in result.history] == [3, 4, 6, 8, 9, 10]
  evaluated = {r['step']: r for r in result.history if 'eval_loss' in r}
  assert list(evaluated) == [4, 8, 10]
  assert 0 < evaluated[10]['eval_loss'] < 2 * np.log(V)
  means = [np.mean(losses(straight(''))[i : i + 3]) for i in (0, 3, 6)]
  got = [r['loss'] for r in result.history if r['step'] % 3 == 0]
  np.testing.assert_allclose(got, means, rtol=1e-6)
  # The window after the last full one.
  assert result.history[-1]['loss'] == losses(straight(''))[-1]
  assert result.tokens_per_s > 0 and 0 < result.mfu < 10
  assert result.num_programs == 3 and result.compile_s > 0
  assert (tmp_path / 'tensorboard').is_dir()


def test_time_is_sorted_into_categories(tmp_path):
  start = time.perf_counter()
  first = train(
    workdir=tmp_path,
    steps=6,
    save_every=3,
    dataset=Batches(count=5),
    eval_dataset=Batches(seed=1),
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
  second = train(workdir=tmp_path, steps=8)
  assert second.goodput['lost'] > 0 and second.goodput['step'] > 0
  record = goodput.read(tmp_path)
  assert [i.lost_steps for i in record.incarnations] == [0, 2]
  assert record.seconds['step'] > first.goodput['step']
  for row in metrics_lib.read(tmp_path):
    parts = [v for name, v in row.items() if name.startswith('goodput/')]
    assert len(parts) == len(goodput.CATEGORIES)
    assert sum(parts) == pytest.approx(1)


def test_waiting_for_data_is_data(tmp_path):
  class Slow(Batches):
    def __iter__(self):
      for i, batch in enumerate(Batches()):
        time.sleep(0.2 if i == 3 else 0)
        yield batch

  seconds = train(dataset=Slow()).goodput
  # A step on the device hides some of it.
  assert 0.1 < seconds['data'] < 0.3


def test_a_supervisor_is_told(tmp_path):
  path = tmp_path / 'beat.json'
  phases = []

  class Watched(Batches):
    def __iter__(self):
      for batch in Batches():
        phases.append(beat._beat.phase)
        yield batch

  with Heartbeat(path, fingerprint_every=4) as beat:
    result = train(MESHES[1], dataset=Watched(), heartbeat=beat)
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
  assert_same_state(result, straight(MESHES[1]))


def test_a_supervisor_is_told_of_errors(tmp_path):
  with pytest.raises(loop.NonFiniteError):
    beat = Heartbeat(tmp_path / 'beat.json')
    train(dataset=Batches(bad=2), heartbeat=beat)
  seen = heartbeat.read(tmp_path / 'beat.json')
  assert (seen.step, seen.ended, seen.error) == (2, None, 'NonFiniteError')


def test_nothing_compiles_after_the_first_step():
  compiled = []
  event = '/jax/core/compile/backend_compile_duration'

  def listen(name, *args, **kwargs):
    if name == event:
      compiled.append(watching[0])

  watching = [False]

  class Watched(Batches):
    def __iter__(self):
      for i, batch in enumerate(Batches()):
        watching[0] = i >= 2
        yield batch

  jax.monitoring.register_event_duration_secs_listener(listen)
  train(dataset=Watched())
  watching[0] = False
  assert compiled and not any(compiled)


def test_batches_that_change_shape():
  def batches():
    yield from [next(iter(Batches()))] * 2
    yield {k: v[:4] for k, v in next(iter(Batches())).items()}

  with pytest.raises(ValueError, match=r'step 3: a batch of shape \(4, 16\)'):
    train(dataset=batches())


def test_growing_batches_are_resumed_exactly(tmp_path):
  options = dict(spec='data=8', noise_scale=True, steps=9)
  rows = lambda: growing(
    Batches(), rows=B, seq_len=T, max_rows=4 * B, patience=2, tolerance=1e-3
  )
  whole = train(dataset=rows(), **options)
  first = train(dataset=rows(), workdir=tmp_path, **options | dict(steps=4))
  second = train(dataset=rows(), workdir=tmp_path, **options)
  assert losses(first) + losses(second) == losses(whole)
  assert_same_state(second, whole)
  sizes = [r['weight'] for r in whole.history]
  assert sizes == sorted(sizes)
  assert set(sizes) == {B * T, 2 * B * T, 4 * B * T}
  assert whole.history[-1]['tokens'] == sum(sizes)
  assert whole.num_programs == 4


@pytest.mark.parametrize(
  'options, message',
  [
    (dict(steps=0), 'steps=0'),
    (dict(log_every=0), 'log_every=0'),
    (dict(accumulation=0), 'accumulation=0'),
    (dict(saving='eager'), "saving='eager' .*async, lazy"),
    (dict(staging_gib=1), "staging_gib=1 is of saving='lazy'"),
    (dict(spec='data=3'), 'does not divide'),
    (dict(failed_save='ignore'), "failed_save='ignore' must be one of raise"),
  ],
)
def test_wrong_arguments(options, message):
  with pytest.raises(ValueError, match=message):
    train(**options)


def test_checkpoint_of_another_model_is_refused(tmp_path):
  train(workdir=tmp_path, steps=1)
  other = Transformer(ModelConfig(**{**vars(CONFIG), 'mlp_dim': 48}))
  with pytest.raises(ValueError, match='mlp'):
    loop.train(
      other,
      optax.adamw(1e-2),
      Batches(),
      mesh=make_mesh(),
      rules=PRESETS['default'],
      steps=2,
      workdir=tmp_path,
      progress=False,
    )
