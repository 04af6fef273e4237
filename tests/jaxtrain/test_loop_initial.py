"""A run that begins with another's checkpoint goes on as that one did."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from jaxtrain import loop
from jaxtrain import train_state
from jaxtrain.checkpoints import convert
from jaxtrain.checkpoints import remap_language
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import make_mesh

_RULES = PRESETS['default']
_TX = optax.adamw(1e-2)
_CONFIG = ModelConfig(
  vocab_size=32,
  embed_dim=8,
  num_layers=1,
  num_heads=2,
  num_kv_heads=2,
  head_dim=4,
  mlp_dim=16,
  max_seq_len=8,
)


class _Batches:
  """The same random batches every time."""

  def __iter__(self):
    return _Iterator()


class _Iterator:
  def __init__(self):
    self._number = 0

  def __iter__(self):
    return self

  def __next__(self):
    tokens = np.random.default_rng(self._number).integers(0, 32, (4, 9))
    self._number += 1
    return dict(
      tokens=tokens[:, :-1].astype(np.int32),
      targets=tokens[:, 1:].astype(np.int32),
      positions=np.tile(np.arange(8, dtype=np.int32), (4, 1)),
      segment_ids=np.ones((4, 8), np.int32),
      weights=np.ones((4, 8), np.float32),
    )

  def get_state(self):
    return self._number

  def set_state(self, number):
    self._number = number


def _train(workdir, steps=4):
  return loop.train(
    Transformer(_CONFIG),
    _TX,
    _Batches(),
    mesh=make_mesh(''),
    rules=_RULES,
    steps=steps,
    workdir=workdir,
    save_every=2,
    log_every=1,
    progress=False,
  )


def _begin(workdir, source, rules, new, **options):
  spec = train_state.state_spec(
    Transformer(_CONFIG), _TX, make_mesh(''), _RULES
  )
  return convert.begin(
    workdir / 'checkpoints',
    source / 'checkpoints',
    rules,
    vars(spec.abstract),
    new,
    config=_CONFIG,
    metadata={},
    **options,
  )


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
  """The folder and the result of a run of four steps."""
  folder = tmp_path_factory.mktemp('straight')
  return folder, _train(folder)


def _refuse():
  raise AssertionError('made a new state')


def test_a_run_begins_with_anothers_checkpoint(tmp_path, straight):
  folder, wanted = straight
  assert _begin(tmp_path, folder, [], _refuse, step=2, data_state=2)
  result = _train(tmp_path)
  assert [h['step'] for h in result.history] == [3, 4]
  jax.tree.map(np.testing.assert_array_equal, result.state, wanted.state)
  # Its own checkpoints come first, where there are some.
  assert not _begin(tmp_path, folder, [], _refuse, step=2, data_state=2)
  assert _train(tmp_path).step == 4


def test_what_rules_leave_to_a_new_state_is_the_new_states(tmp_path, straight):
  folder, wanted = straight
  rules = [
    *remap_language.PARAMS_ONLY,
    {'rule': 'init', 'from': '/(opt_state/.*|step|rng)'},
  ]
  fresh = train_state.init_state(
    Transformer(_CONFIG), _TX, make_mesh(''), _RULES, seed=3
  )
  assert _begin(tmp_path, folder, rules, lambda: vars(fresh), data_state=0)
  state = _train(tmp_path, steps=1).state
  assert int(state.step) == 1 and int(state.opt_state[0].count) == 1
  found, _, _ = CheckpointManager(tmp_path / 'checkpoints').restore(
    vars(fresh), step=0
  )
  expected = dataclasses.replace(fresh, params=wanted.state.params)
  jax.tree.map(np.testing.assert_array_equal, found, vars(expected))
