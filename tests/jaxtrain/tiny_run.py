"""A tiny training run that tests of the loop share."""

import functools

import jax
import numpy as np
import optax

from jaxtrain import loop
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import make_mesh

B, T, V = 8, 16, 32
CONFIG = ModelConfig(
  vocab_size=V,
  embed_dim=16,
  num_layers=2,
  num_heads=2,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=32,
  max_seq_len=T,
)
MESHES = ('', 'data=2,fsdp=2,tensor=2')


class Batches:
  """Random batches whose iterator can be saved; optionally spoilt or ending."""

  def __init__(self, bad=None, count=10**9, seed=0):
    self.bad, self.count, self.seed = bad, count, seed

  def __iter__(self):
    return Iterator(self)


class Iterator:
  def __init__(self, batches):
    self._batches, self._index = batches, 0

  def __iter__(self):
    return self

  def __next__(self):
    if self._index >= self._batches.count:
      raise StopIteration
    rng = np.random.default_rng((self._batches.seed, self._index))
    tokens = rng.integers(0, V, (B, T + 1)).astype(np.int32)
    weights = np.ones((B, T), np.float32)
    if self._index == self._batches.bad:
      weights[:] = np.nan
    self._index += 1
    return dict(
      tokens=tokens[:, :-1],
      targets=tokens[:, 1:],
      positions=np.tile(np.arange(T, dtype=np.int32), (B, 1)),
      segment_ids=np.ones((B, T), np.int32),
      weights=weights,
    )

  def get_state(self):
    return {'index': self._index}

  def set_state(self, state):
    self._index = state['index']


def train(spec='', dataset=None, **kwargs):
  defaults = dict(
    mesh=make_mesh(spec),
    rules=PRESETS['default'],
    steps=10,
    log_every=1,
    progress=False,
  )
  return loop.train(
    Transformer(CONFIG),
    optax.adamw(1e-2),
    Batches() if dataset is None else dataset,
    **{**defaults, **kwargs},
  )


@functools.cache
def straight(spec):
  return train(spec)


def losses(result):
  return [row['loss'] for row in result.history]


def assert_same_state(a, b):
  jax.tree.map(np.testing.assert_array_equal, a.state, b.state)
