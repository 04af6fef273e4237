"""A tiny model with every attention feature, and its naive generation."""

import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.engine.features import features_of
from jaxserve.engine.request import seed_of
from jaxserve.engine.runner import Runner
from jaxserve.loading import fitted_rules
from jaxserve.loading import place
from jaxserve.samplers.base import Rows
from jaxserve.samplers.base import RowState
from jaxserve.samplers.processors import process
from jaxserve.samplers.truncated import truncated
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.config import Rope
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import make_mesh

CONTEXT = 96


@jax.jit
def _draw(logits, rows, state):
  rows, state = Rows(**rows), RowState(**state)
  return truncated()(process(logits, rows, state), rows)


@dataclasses.dataclass(frozen=True)
class Tiny:
  """A random model and what it generates without a cache."""

  config: ModelConfig
  params: dict

  @functools.cached_property
  def _logits(self):
    model = Transformer(self.config)
    run = lambda tokens: model.apply({'params': self.params}, tokens)[0][0]
    return jax.jit(run)

  def logits(self, ids):
    """Logits after each of `ids`, recomputed from nothing."""
    padded = np.zeros((1, CONTEXT), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(self._logits(padded))[: len(ids)]

  def greedy(self, prompt, count):
    """The `count` tokens that follow `prompt`."""
    ids = list(prompt)
    for _ in range(count):
      ids.append(int(self.logits(ids)[-1].argmax()))
    return tuple(ids[len(prompt) :])

  def sampled(self, prompt, params, index=0):
    """Tokens of one continuation, each drawn from a full forward."""
    ids = list(prompt)
    features = features_of(params, (), self.config.vocab_size, False)
    rows = dict(
      row=0,
      prompt_len=len(prompt),
      features=features.bits,
      seed=np.uint32(seed_of(params.seed or 0, index)).view(np.int32),
      min_position=0,
      top_k=params.top_k,
      **{
        name: float(getattr(params, name))
        for name in (
          'temperature',
          'top_p',
          'min_p',
          'presence_penalty',
          'frequency_penalty',
          'repetition_penalty',
        )
      },
    )
    no_mask = np.full(-(-self.config.vocab_size // 32), ~np.uint32(0))
    for _ in range(params.max_tokens):
      history = np.zeros((1, CONTEXT), np.int32)
      history[0, : len(ids)] = ids
      state = dict(
        history=history,
        bias_ids=np.array([[*features.bias, -1]], np.int32),
        bias=np.array([[*features.bias.values(), 0]], np.float32),
        stop_ids=np.full((1, 1), -1, np.int32),
        mask=(no_mask if features.mask is None else features.mask)[None],
      )
      values = {k: np.array([v]) for k, v in rows.items()}
      values |= dict(position=np.array([len(ids)]))
      values = {
        k: v.astype(np.float32 if v.dtype == float else np.int32)
        for k, v in values.items()
      }
      ids.append(int(_draw(self.logits(ids)[-1:], values, state)[0]))
    return tuple(ids[len(prompt) :])

  def runner(self, engine, mesh='', num_pages=None):
    """Compiled programs for it."""
    mesh = make_mesh(mesh)
    rules = fitted_rules(self.config, mesh, PRESETS['tensor_parallel'])
    return Runner(
      self.config,
      place(self.params, self.config, mesh, rules),
      mesh,
      rules,
      engine,
      num_pages=num_pages or engine.num_pages,
      max_seq_len=engine.max_seq_len or CONTEXT,
      dtype=jnp.float32,
    )

  def engine(self, runner, config, num_pages=None, tokenizer=None):
    """A new engine over compiled programs; the pool may seem smaller."""
    return Engine(
      runner,
      config,
      max_seq_len=config.max_seq_len or CONTEXT,
      num_pages=num_pages or config.num_pages,
      vocab_size=self.config.vocab_size,
      tokenizer=tokenizer,
    )


@pytest.fixture(scope='session')
def tiny():
  config = ModelConfig(
    vocab_size=264,
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    max_seq_len=CONTEXT,
    qk_norm=True,
    sliding_window=8,
    layer_pattern=('sliding', 'full'),
    sliding_rope=Rope(theta=500.0),
    attention_soft_cap=20.0,
  )
  tokens = jnp.zeros((1, 2), jnp.int32)
  init = jax.jit(lambda k: nn.unbox(Transformer(config).init(k, tokens)))
  params = init(jax.random.key(0))['params']
  # Larger matrices, so that greedy tokens vary and depend on the far past.
  grow = lambda x: 3 * x if x.ndim > 2 else x
  return Tiny(config, jax.tree.map(grow, params))


@pytest.fixture(scope='session')
def small_engine():
  """Sizes that make chunks, padding and full batches common."""
  return EngineConfig(
    max_num_requests=4,
    page_size=4,
    num_pages=96,
    max_step_tokens=24,
    token_buckets=(4, 24),
  )


@pytest.fixture(scope='session')
def small_runner(tiny, small_engine):
  return tiny.runner(small_engine)
