"""A run that starts from another's checkpoint goes on as that one did."""

import itertools

import jax
import numpy as np
import optax
import pytest

from jaxtrain import loop
from jaxtrain.checkpoints import convert
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import make_mesh

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
  """The same random batches every time, from number `first`."""

  def __init__(self, first=0):
    self._first = first

  def __iter__(self):
    return map(self._batch, itertools.count(self._first))

  def _batch(self, number):
    tokens = np.random.default_rng(number).integers(0, 32, (4, 9))
    return dict(
      tokens=tokens[:, :-1].astype(np.int32),
      targets=tokens[:, 1:].astype(np.int32),
      positions=np.tile(np.arange(8, dtype=np.int32), (4, 1)),
      segment_ids=np.ones((4, 8), np.int32),
      weights=np.ones((4, 8), np.float32),
    )


def _train(workdir, first=0, mesh='', **options):
  return loop.train(
    Transformer(_CONFIG),
    optax.adamw(1e-2),
    _Batches(first),
    mesh=make_mesh(mesh),
    rules=PRESETS['default'],
    steps=4,
    workdir=workdir,
    save_every=2,
    log_every=1,
    progress=False,
    **options,
  )


def test_a_run_starts_from_anothers_checkpoint(tmp_path):
  straight = _train(tmp_path / 'a')
  source = tmp_path / 'a' / 'checkpoints'

  def initial(target, new):
    return convert.restore(source, [], target, new, step=2)

  result = _train(tmp_path / 'b', first=2, initial=initial)
  assert [h['step'] for h in result.history] == [3, 4]
  jax.tree.map(np.testing.assert_array_equal, result.state, straight.state)
  # Its own checkpoint comes first, where there is one.
  again = _train(tmp_path / 'b', initial=None)
  assert again.step == 4 and not again.history

  def refuse(target, new):
    raise AssertionError('read')

  _train(tmp_path / 'b', initial=refuse)


def test_what_rules_leave_to_the_seed_is_the_seeds(tmp_path):
  _train(tmp_path / 'a')
  rules = [
    {'rule': 'drop', 'from': '/(?!params/).*'},
    {'rule': 'init', 'from': '/(opt_state/.*|step|rng)'},
  ]
  made = []

  def initial(target, new):
    made.append(
      convert.restore(tmp_path / 'a' / 'checkpoints', rules, target, new)
    )
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    _train(None, initial=initial)
  assert made[0]['step'] == 0
  moments = made[0]['opt_state'][0]
  assert all(not np.any(x) for x in jax.tree.leaves(moments))
  assert any(np.any(x) for x in jax.tree.leaves(made[0]['params']))
