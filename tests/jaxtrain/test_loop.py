"""Resuming changes nothing, and what goes wrong is named."""

import functools
import itertools
import os
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
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.checkpoints.manager import NoSpaceError
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import constrainer
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


class _Killed(BaseException):
  """Stands for the end of the process: nothing of the loop catches it."""


class _Dying(_Batches):
  """Batches whose reader dies when it asks for one of them."""

  def __init__(self, at):
    super().__init__()
    self.at = at

  def __iter__(self):
    return _DyingIterator(self)


class _DyingIterator(_Iterator):
  def __next__(self):
    if self._index == self._batches.at:
      raise _Killed
    return super().__next__()


def _measured(folder):
  """Rows of metrics.csv without what the clock says."""
  rows = metrics_lib.read(folder)
  clock = ('tokens_per_s', 'mfu')
  return [{k: v for k, v in row.items() if k not in clock} for row in rows]


# Rows of means over 3 steps, checkpoints every 2: they do not coincide.
_UNEVEN = dict(
  steps=11,
  log_every=3,
  save_every=2,
  eval_dataset=_Batches(seed=1, count=2),
  eval_every=4,
)


@pytest.fixture(scope='module')
def uneven(tmp_path_factory):
  """A run with `_UNEVEN`, and its folder."""
  folder = tmp_path_factory.mktemp('uneven')
  return _train(workdir=folder, **_UNEVEN), folder


@pytest.mark.parametrize('stopped_at, died_at', [(None, 5), (None, 8), (5, 10)])
def test_metrics_of_a_killed_and_resumed_run(
  tmp_path, uneven, stopped_at, died_at
):
  straight, folder = uneven
  if stopped_at is not None:
    _train(dataset=_Signalling(stopped_at), workdir=tmp_path, **_UNEVEN)
  with pytest.raises(_Killed):
    _train(dataset=_Dying(died_at), workdir=tmp_path, **_UNEVEN)
  resumed = _train(workdir=tmp_path, **_UNEVEN)
  assert _measured(tmp_path) == _measured(folder)
  assert [row['step'] for row in _measured(tmp_path)] == [3, 4, 6, 8, 9, 11]
  _assert_same_state(resumed, straight)


@pytest.mark.parametrize('stopped_at', [None, 10])
def test_metrics_of_a_finished_run_called_again(tmp_path, uneven, stopped_at):
  """Its last row stays, and is made if a signal came at the last step."""
  dataset = None if stopped_at is None else _Signalling(stopped_at)
  _train(dataset=dataset, workdir=tmp_path, **_UNEVEN)
  _train(workdir=tmp_path, **_UNEVEN)
  assert _measured(tmp_path) == _measured(uneven[1])


class _Signalling(_Batches):
  """Batches whose reader is told to stop when it asks for one of them."""

  def __init__(self, at):
    super().__init__()
    self.at = at

  def __iter__(self):
    return _SignallingIterator(self)


class _SignallingIterator(_Iterator):
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
  _train(workdir=tmp_path, steps=9, save_every=3)
  name = _damage(tmp_path / 'checkpoints', 9)
  resumed = _train(workdir=tmp_path, save_every=3, progress=True)
  said = capsys.readouterr().err
  assert 'WARNING: checkpoint step 9' in said and f'{name} [' in said
  assert 'resumed from step 6' in said
  _assert_same_state(resumed, _straight(''))
  assert _losses(resumed) == _losses(_straight(''))[6:]
  names = sorted(p.name for p in (tmp_path / 'checkpoints').iterdir())
  assert names == ['00000006', '00000009', '00000009.damaged', '00000010']


def test_checkpoints_are_kept_by_metric_and_by_step(tmp_path):
  result = _train(
    workdir=tmp_path,
    save_every=1,
    keep=1,
    keep_every=4,
    keep_best=['eval_loss', 'min', 1],
    eval_dataset=_Batches(seed=1, count=2),
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
  _train(workdir=tmp_path, steps=3)
  monkeypatch.setattr(disk_space, 'shortage', _full)
  with pytest.raises(NoSpaceError, match='step 6 .*latest .* is step 3'):
    _train(workdir=tmp_path, save_every=3)


def test_training_goes_on_without_room_if_told_so(
  tmp_path, monkeypatch, capsys
):
  shortage = disk_space.shortage
  tries = []

  def full_at_first(*args):
    tries.append(args)
    return _full() if len(tries) < 3 else shortage(*args)

  monkeypatch.setattr(disk_space, 'shortage', full_at_first)
  result = _train(
    workdir=tmp_path, save_every=3, failed_save='go_on', progress=True
  )
  assert result.step == 10
  said = capsys.readouterr().err
  assert said.count('WARNING: training goes on without a checkpoint') == 2
  with CheckpointManager(tmp_path / 'checkpoints') as manager:
    assert manager.all_steps() == [9, 10]
  monkeypatch.setattr(disk_space, 'shortage', _full)
  with pytest.raises(NoSpaceError):  # The last save must not be lost unsaid.
    _train(workdir=tmp_path, steps=12, failed_save='go_on')


def test_two_runs_in_one_folder_are_refused(tmp_path):
  with CheckpointManager(tmp_path / 'checkpoints') as other:
    other.claim()
    with pytest.raises(ValueError, match='two runs would delete'):
      _train(workdir=tmp_path)


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


def _lazy_reference(spec, steps):
  """States after each step of the two programs, and losses; none is saved."""
  mesh, rules = make_mesh(spec), PRESETS['default']
  model = Transformer(_CONFIG, shard=constrainer(mesh, rules))
  tx = optax.adamw(1e-2)
  split = train_step_lib.make_split_step(model, tx, mesh, rules)
  state = train_state_lib.init_state(model, tx, mesh, rules)
  states, losses = [None], []
  for batch in itertools.islice(_Batches(), steps):
    batch = jax.device_put(batch, train_step_lib.batch_shardings(mesh, rules))
    state, metrics = split.update(state, split.gradients(state, batch))
    losses.append(float(metrics['loss']))
    states.append(jax.tree.map(np.array, state))
  return states, losses


def test_lazy_checkpoints_are_the_states_and_resume_bit_exact(tmp_path):
  spec = _MESHES[1]
  options = dict(spec=spec, saving='lazy', save_every=1, keep=10)
  # A part of the state: copies wait for the disk, and updates for copies.
  first = _train(
    workdir=tmp_path, steps=4, staging_gib=16_000 / 2**30, **options
  )
  second = _train(workdir=tmp_path, steps=7, seed=99, **options)
  assert (first.step, second.step) == (4, 7)
  wanted, losses = _lazy_reference(spec, 7)
  assert _losses(first) + _losses(second) == losses
  with CheckpointManager(tmp_path / 'checkpoints') as manager:
    assert manager.all_steps() == list(range(1, 8))
    for step in manager.all_steps():
      state, data_state, _ = manager.restore(vars(second.state), step)
      jax.tree.map(np.testing.assert_array_equal, state, vars(wanted[step]))
      assert data_state == {'index': step}


def test_lazy_save_of_a_non_finite_step_is_given_up(tmp_path):
  with pytest.raises(loop.NonFiniteError, match='good checkpoint: step 3'):
    _train(
      dataset=_Batches(bad=3), workdir=tmp_path, saving='lazy', save_every=1
    )
  names = [p.name for p in (tmp_path / 'checkpoints').iterdir()]
  assert sorted(names) == ['00000001', '00000002', '00000003']


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
    (dict(saving='eager'), "saving='eager' .*async, lazy"),
    (dict(staging_gib=1), "staging_gib=1 is of saving='lazy'"),
    (dict(spec='data=3'), 'does not divide'),
    (dict(failed_save='ignore'), "failed_save='ignore' must be one of raise"),
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
