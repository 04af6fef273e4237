"""The computation of one serving step; holds no arrays.

Apart from `Runner`, which runs it, so that it can also be compiled for devices
that are not there.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import attention
from jaxserve import samplers
from jaxserve.cache import pages as pages_lib
from jaxserve.engine import drawing
from jaxserve.engine import row_state
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.layout import Layout
from jaxserve.samplers.base import RowState
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import ShardingRules
from jaxtrain.sharding import constrainer
from jaxtrain.sharding import named_sharding

# Enough for the end-of-text tokens of any model and some of a request's own.
_MAX_STOP_IDS = 16


class Step:
  """What every token bucket of an engine runs.

  Args:
    config: Architecture.
    mesh: Where it runs.
    rules: How the parameters are laid out.
    engine: Sizes.
    num_pages: Pages in the pool.
    max_seq_len: Longest request, in tokens.
    dtype: Compute dtype.
  """

  def __init__(
    self,
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    rules: ShardingRules,
    engine: EngineConfig,
    *,
    num_pages: int,
    max_seq_len: int,
    dtype: Any,
  ):
    # The flat batch of one step is not split; heads and features are.
    rules = serving_rules(rules, mesh, config)
    self._shard = constrainer(mesh, rules)
    self._model = Transformer(config, dtype=dtype, shard=self._shard)
    self.num_logprobs = min(engine.max_logprobs, config.vocab_size)
    self._draw = drawing.drawing(
      samplers.get(engine.sampler)(), mesh, self.num_logprobs
    )
    self._make_attend = attention.get(engine.attention)
    self.replicated = named_sharding(mesh, rules)
    self.pool = named_sharding(
      mesh, rules, None, None, 'act_kv_heads', None, None
    )
    self.allocate_pages: Callable[[], pages_lib.Pages] = functools.partial(
      pages_lib.allocate,
      config.num_layers,
      num_pages,
      engine.page_size,
      num_stored_heads(rules, mesh, config),
      config.head_dim,
      dtype if engine.kv_dtype is None else engine.kv_dtype,
      self.pool,
    )
    self.sizes = row_state.RowSizes(
      engine.max_num_requests,
      max_seq_len,
      config.vocab_size,
      engine.max_logit_bias,
      _MAX_STOP_IDS,
    )
    self.allocate_state: Callable[[], RowState] = functools.partial(
      row_state.allocate, self.sizes, self.replicated
    )
    pages_per_row = -(-max_seq_len // engine.page_size)
    self.layouts = {
      t: Layout(t, engine.max_num_requests, pages_per_row)
      for t in engine.buckets
    }

  def jitted(self, layout: Layout) -> Callable[..., Any]:
    """`step(params, pages, state, buffer)` of one bucket.

    Pages and row state are donated and come back first and second; the third
    result is what `drawing.unpack` reads.
    """
    return jax.jit(functools.partial(self._run, layout), donate_argnums=(1, 2))

  def abstract_args(self, layout: Layout) -> tuple[Any, ...]:
    """Shapes of the arguments of `jitted` after the parameters."""
    return (
      self.abstract(self.allocate_pages, self.pool),
      self.abstract(self.allocate_state, self.replicated),
      self.abstract(lambda: jnp.zeros(layout.size, jnp.int32), self.replicated),
    )

  def abstract(self, make: Callable[[], Any], sharding: Any) -> Any:
    """Shapes of what `make` would make."""
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      jax.eval_shape(make),
    )

  def pin(self, tree: Any) -> Any:
    """The same on every device."""
    pin = lambda x: jax.lax.with_sharding_constraint(x, self.replicated)
    return jax.tree.map(pin, tree)

  def _run(self, layout, params, pages, state, buffer):
    fields = layout.unpack(buffer)
    pages, state, _, packed = self._once(layout, params, pages, state, fields)
    return pages, self.pin(state), self.pin(packed)

  def _once(self, layout, params, pages, state, f):
    row, positions = f['token_row'], f['positions']
    known = f['tokens']
    tokens = jnp.where(known < 0, state.history[row, positions], known)
    num_rows = layout.num_rows
    state = row_state.record(
      state, jnp.where(f['slot'] < 0, num_rows, row), positions, tokens
    )
    batch = layout.batch(f, tokens)
    logits, pages = self._model.apply(
      {'params': params},
      batch.tokens[None],
      batch.positions[None],
      self._make_attend(batch, self._shard),
      pages,
      select=lambda x: x[:, f['sample_index']],
    )
    rows = layout.rows(f)
    wanted = drawing.Wanted(
      f['num_logprobs'], f['target'], f['wants_processed']
    )
    tokens, packed = self._draw(logits[0], rows, wanted, state)
    # What follows a target is known, and has its place in the history.
    row = jnp.where(f['target'] < 0, rows.row, num_rows)
    state = row_state.record(state, row, rows.position, tokens)
    return pages, state, tokens, packed


def serving_rules(
  rules: ShardingRules, mesh: jax.sharding.Mesh, config: ModelConfig
) -> ShardingRules:
  """Rules of the activations of a step: tokens whole, heads split.

  Raises:
    ValueError: The mesh axes of the heads do not divide the query heads, or
      the kv heads neither divide them nor are divided by them.
  """
  shards = num_head_shards(rules, mesh)
  if config.num_heads % shards or (
    config.num_kv_heads % shards and shards % config.num_kv_heads
  ):
    raise ValueError(
      f'{shards} shards of heads do not fit num_heads={config.num_heads} and '
      f'num_kv_heads={config.num_kv_heads}: they must divide the first, and '
      'divide or be a multiple of the second'
    )
  heads = rules.table.get('act_heads', ())
  return rules.replace(batch=None, seq=None, act_kv_heads=heads)


def num_head_shards(rules: ShardingRules, mesh: jax.sharding.Mesh) -> int:
  """Over how many devices the query heads are split."""
  axes = rules.table.get('act_heads', ())
  return int(np.prod([mesh.shape[a] for a in axes], dtype=int))


def num_stored_heads(
  rules: ShardingRules, mesh: jax.sharding.Mesh, config: ModelConfig
) -> int:
  """Kv heads in the pool: each is stored once per shard that reads it."""
  return max(config.num_kv_heads, num_head_shards(rules, mesh))
