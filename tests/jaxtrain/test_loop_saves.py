"""Runs that were killed, stopped or damaged go on as if nothing had been."""

import itertools
import os
import shutil
import signal

import jax
import numpy as np
import optax
import pytest

from jaxtrain import loop
from jaxtrain import metrics as metrics_lib
from jaxtrain import train_state as train_state_lib
from jaxtrain import train_step as train_step_lib
from jaxtrain.checkpoints import disk_space
from jaxtrain.checkpoints import file_list
from jaxtrain.checkpoints.in_memory.keeper import Keeper
from jaxtrain.checkpoints.in_memory.snapshots import InMemorySnapshots
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.checkpoints.manager import NoSpaceError
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import constrainer
from jaxtrain.sharding import make_mesh
from tests.jaxtrain.tiny_run import CONFIG
from tests.jaxtrain.tiny_run import MESHES
from tests.jaxtrain.tiny_run import Batches
from tests.jaxtrain.tiny_run import Iterator
from tests.jaxtrain.tiny_run import assert_same_state
from tests.jaxtrain.tiny_run import losses
from tests.jaxtrain.tiny_run import straight
from tests.jaxtrain.tiny_run import train


@pytest.mark.parametrize('spec', MESHES)
def test_resumed_run_is_bit_exact(spec, tmp_path):
  whole = straight(spec)
  first = train(spec, workdir=tmp_path, steps=5)
  # The seed of the second call is not used: the state has its own.
  second = train(spec, workdir=tmp_path, steps=10, seed=99)
  assert (first.step, second.step) == (5, 10)
  assert losses(first) + losses(second) == losses(whole)
  assert_same_state(second, whole)
  rows = metrics_lib.read(tmp_path)
  assert [r['step'] for r in rows] == list(range(1, 11))
  assert [r['loss'] for r in rows] == losses(whole)


class _Killed(BaseException):
  """Stands for the end of the process: nothing of the loop catches it."""


class _Dying(Batches):
  """Batches whose reader dies when it asks for one of them."""

  def __init__(self, at):
    super().__init__()
    self.at = at

  def __iter__(self):
    return _DyingIterator(self)


class _DyingIterator(Iterator):
  def __next__(self):
    if self._index == self._batches.at:
      raise _Killed
    return super().__next__()


def _measured(folder):
  """Rows of metrics.csv without what the clock says."""
  rows = metrics_lib.read(folder)
  is_clock = lambda k: k in ('tokens_per_s', 'mfu') or k.startswith('goodput/')
  return [{k: v for k, v in row.items() if not is_clock(k)} for row in rows]


# Rows of means over 3 steps, checkpoints every 2: they do not coincide.
_UNEVEN = dict(
  steps=11,
  log_every=3,
  save_every=2,
  eval_dataset=Batches(seed=1, count=2),
  eval_every=4,
)


@pytest.fixture(scope='module')
def uneven(tmp_path_factory):
  """A run with `_UNEVEN`, and its folder."""
  folder = tmp_path_factory.mktemp('uneven')
  return train(workdir=folder, **_UNEVEN), folder


@pytest.mark.parametrize('stopped_at, died_at', [(None, 5), (None, 8), (5, 10)])
def test_metrics_of_a_killed_and_resumed_run(
  tmp_path, uneven, stopped_at, died_at
):
  straight, folder = uneven
  if stopped_at is not None:
    train(dataset=_Signalling(stopped_at), workdir=tmp_path, **_UNEVEN)
  with pytest.raises(_Killed):
    train(dataset=_Dying(died_at), workdir=tmp_path, **_UNEVEN)
  resumed = train(workdir=tmp_path, **_UNEVEN)
  assert _measured(tmp_path) == _measured(folder)
  assert [row['step'] for row in _measured(tmp_path)] == [3, 4, 6, 8, 9, 11]
  assert_same_state(resumed, straight)


@pytest.mark.parametrize('stopped_at', [None, 10])
def test_metrics_of_a_finished_run_called_again(tmp_path, uneven, stopped_at):
  """Its last row stays, and is made if a signal came at the last step."""
  dataset = None if stopped_at is None else _Signalling(stopped_at)
  train(dataset=dataset, workdir=tmp_path, **_UNEVEN)
  train(workdir=tmp_path, **_UNEVEN)
  assert _measured(tmp_path) == _measured(uneven[1])


class _Signalling(Batches):
  """Batches whose reader is told to stop when it asks for one of them."""

  def __init__(self, at):
    super().__init__()
    self.at = at

  def __iter__(self):
    return _SignallingIterator(self)


class _SignallingIterator(Iterator):
  def __next__(self):
    if self._index == self._batches.at:
      os.kill(os.getpid(), signal.SIGTERM)
    return super().__next__()


def _damage(checkpoints, step):
  """Flips a bit of an array of a checkpoint."""
  folder = checkpoints / f'{step:08d}'
  pieces = file_list.read(folder).pieces
  span = next(p.span for p in pieces if p.span.array)
  data = bytearray((folder / span.file).read_bytes())
  data[span.start] ^= 1
  (folder / span.file).write_bytes(data)
  return span.array


def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys):
  train(workdir=tmp_path, steps=9, save_every=3)
  name = _damage(tmp_path / 'checkpoints', 9)
  resumed = train(workdir=tmp_path, save_every=3, progress=True)
  said = capsys.readouterr().err
  assert 'WARNING: checkpoint step 9' in said and f'{name} [' in said
  assert 'resumed from step 6' in said
  assert_same_state(resumed, straight(''))
  assert losses(resumed) == losses(straight(''))[6:]
  names = sorted(p.name for p in (tmp_path / 'checkpoints').iterdir())
  assert names == ['00000006', '00000009', '00000009.damaged', '00000010']


def test_checkpoints_are_kept_by_metric_and_by_step(tmp_path):
  result = train(
    workdir=tmp_path,
    save_every=1,
    keep=1,
    keep_every=4,
    keep_best=['eval_loss', 'min', 1],
    eval_dataset=Batches(seed=1, count=2),
    eval_every=1,
  )
  evaluated = {r['step']: r['eval_loss'] for r in result.history}
  best = min(evaluated, key=evaluated.get)
  with CheckpointManager(tmp_path / 'checkpoints') as manager:
    assert manager.all_steps() == sorted({4, 8, 10, best})
    assert manager.metrics(best)['eval_loss'] == evaluated[best]
    assert manager.metrics(10)['eval_loss'] == evaluated[10]


def _full(*args):
  return 'the disk is small'


def test_a_save_without_room_ends_training_by_default(tmp_path, monkeypatch):
  train(workdir=tmp_path, steps=3)
  monkeypatch.setattr(disk_space, 'shortage', _full)
  with pytest.raises(NoSpaceError, match='step 6 .*latest .* is step 3'):
    train(workdir=tmp_path, save_every=3)


def test_training_goes_on_without_room_if_told_so(
  tmp_path, monkeypatch, capsys
):
  shortage = disk_space.shortage
  tries = []

  def full_at_first(*args):
    tries.append(args)
    return _full() if len(tries) < 3 else shortage(*args)

  monkeypatch.setattr(disk_space, 'shortage', full_at_first)
  result = train(
    workdir=tmp_path, save_every=3, failed_save='go_on', progress=True
  )
  assert result.step == 10
  said = capsys.readouterr().err
  assert said.count('WARNING: training goes on without a checkpoint') == 2
  with CheckpointManager(tmp_path / 'checkpoints') as manager:
    assert manager.all_steps() == [9, 10]
  monkeypatch.setattr(disk_space, 'shortage', _full)
  with pytest.raises(NoSpaceError):  # The last save must not be lost unsaid.
    train(workdir=tmp_path, steps=12, failed_save='go_on')


def test_two_runs_in_one_folder_are_refused(tmp_path):
  with CheckpointManager(tmp_path / 'checkpoints') as other:
    other.claim()
    with pytest.raises(ValueError, match='two runs would delete'):
      train(workdir=tmp_path)


def _lazy_reference(spec, steps):
  """States after each step of the two programs, and losses; none is saved."""
  mesh, rules = make_mesh(spec), PRESETS['default']
  model = Transformer(CONFIG, shard=constrainer(mesh, rules))
  tx = optax.adamw(1e-2)
  split = train_step_lib.make_split_step(model, tx, mesh, rules)
  state = train_state_lib.init_state(model, tx, mesh, rules)
  states, losses = [None], []
  for batch in itertools.islice(Batches(), steps):
    batch = jax.device_put(batch, train_step_lib.batch_shardings(mesh, rules))
    state, metrics = split.update(state, split.gradients(state, batch))
    losses.append(float(metrics['loss']))
    states.append(jax.tree.map(np.array, state))
  return states, losses


def test_lazy_checkpoints_are_the_states_and_resume_bit_exact(tmp_path):
  spec = MESHES[1]
  options = dict(spec=spec, saving='lazy', save_every=1, keep=10)
  # A part of the state: copies wait for the disk, and updates for copies.
  first = train(
    workdir=tmp_path, steps=4, staging_gib=16_000 / 2**30, **options
  )
  second = train(workdir=tmp_path, steps=7, seed=99, **options)
  assert (first.step, second.step) == (4, 7)
  wanted, expected = _lazy_reference(spec, 7)
  assert losses(first) + losses(second) == expected
  with CheckpointManager(tmp_path / 'checkpoints') as manager:
    assert manager.all_steps() == list(range(1, 8))
    for step in manager.all_steps():
      state, data_state, _ = manager.restore(vars(second.state), step)
      jax.tree.map(np.testing.assert_array_equal, state, vars(wanted[step]))
      assert data_state == {'index': step}


def test_lazy_save_of_a_non_finite_step_is_given_up(tmp_path):
  with pytest.raises(loop.NonFiniteError, match='good checkpoint: step 3'):
    train(
      dataset=Batches(bad=3),
      workdir=tmp_path,
      saving='lazy',
      save_every=1,
    )
  names = [p.name for p in (tmp_path / 'checkpoints').iterdir()]
  assert sorted(names) == ['00000001', '00000002', '00000003']


class _OutOfData(Batches):
  """An error instead of the eighth batch."""

  def __iter__(self):
    class Dying(Iterator):
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
  spec = MESHES[1]

  def run_on(**options):
    with InMemorySnapshots(keepers) as snapshots:
      options = dict(snapshots=snapshots, snapshot_every=2) | options
      return train(spec, workdir=tmp_path, save_every=3, **options)

  with pytest.raises(OSError, match='the disk'):
    run_on(dataset=_OutOfData())
  with CheckpointManager(tmp_path / 'checkpoints') as manager:
    assert manager.all_steps() == [3, 6]
  with InMemorySnapshots(keepers) as snapshots:
    assert snapshots.steps() == [4, 6]
  # Of the same step, memory.
  shutil.rmtree(tmp_path / 'checkpoints' / '00000006')
  result = run_on(steps=9)
  assert [r['step'] for r in result.history] == [7, 8, 9]
  # Storage has step 9, memory 8.
  result = run_on()
  assert [r['step'] for r in result.history] == [10]
  assert_same_state(result, straight(spec))
