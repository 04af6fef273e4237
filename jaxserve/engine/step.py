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
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.layout import Layout
from jaxserve.samplers import base as sampler_base
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import ShardingRules
from jaxtrain.sharding import constrainer
from jaxtrain.sharding import named_sharding


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
    self._sample = split_rows(samplers.get(engine.sampler)(), mesh)
    self._make_attend = attention.get(engine.attention)
    self.replicated = named_sharding(mesh, rules)
    pool = named_sharding(mesh, rules, None, None, 'act_kv_heads', None, None)
    self.allocate_pages: Callable[[], pages_lib.Pages] = functools.partial(
      pages_lib.allocate,
      config.num_layers,
      num_pages,
      engine.page_size,
      num_stored_heads(rules, mesh, config),
      config.head_dim,
      dtype if engine.kv_dtype is None else engine.kv_dtype,
      pool,
    )
    self._pool = pool
    self._num_rows = engine.max_num_requests
    self.num_logprobs = min(engine.max_logprobs, config.vocab_size)
    pages_per_row = -(-max_seq_len // engine.page_size)
    self.layouts = {
      t: Layout(t, engine.max_num_requests, pages_per_row)
      for t in engine.buckets
    }

  def jitted(self, layout: Layout) -> Callable[..., Any]:
    """`step(params, pages, last_tokens, buffer)` of one bucket.

    Pages and last tokens are donated and come back first and second; the third
    result is `StepResult.packed`.
    """
    return jax.jit(functools.partial(self._run, layout), donate_argnums=(1, 2))

  def abstract_args(self, layout: Layout) -> tuple[Any, ...]:
    """Shapes of the arguments of `jitted` after the parameters."""
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    pages = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._pool),
      jax.eval_shape(self.allocate_pages),
    )
    return (
      pages,
      struct((self._num_rows,), sharding=self.replicated),
      struct((layout.size,), sharding=self.replicated),
    )

  def _run(self, layout, params, pages, last_tokens, buffer):
    fields = layout.unpack(buffer)
    batch = layout.batch(fields, last_tokens)
    index = fields['sample_index']
    logits, pages = self._model.apply(
      {'params': params},
      batch.tokens[None],
      batch.positions[None],
      self._make_attend(batch, self._shard),
      pages,
      select=lambda x: x[:, index],
    )
    tokens = self._sample(logits[0], layout.rows(fields))
    last_tokens = last_tokens.at[fields['sample_row']].set(tokens, mode='drop')
    packed = self._pack(logits[0], tokens, fields['num_logprobs'])
    pin = lambda x: jax.lax.with_sharding_constraint(x, self.replicated)
    return pages, pin(last_tokens), pin(packed)

  def _pack(self, logits, tokens, num_logprobs):
    n = self.num_logprobs
    bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.int32)

    def with_logprobs():
      logprobs = jax.nn.log_softmax(logits, axis=-1)
      chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)
      values, ids = jax.lax.top_k(logprobs, n)
      return jnp.concatenate([bits(chosen), ids, bits(values)], axis=-1)

    extra = jax.lax.cond(
      jnp.any(num_logprobs >= 0),
      with_logprobs,
      lambda: jnp.zeros((logits.shape[0], 1 + 2 * n), jnp.int32),
    )
    return jnp.concatenate([tokens[:, None], extra], axis=-1)


def split_rows(
  sample: sampler_base.Sampler, mesh: jax.sharding.Mesh
) -> sampler_base.Sampler:
  """Each device draws its share of the rows, from whole vocabularies.

  One exchange of the logits then replaces one of counts for every step of every
  cut-off. Rows that do not divide, as in a small bucket, are drawn everywhere.
  """
  if mesh.size == 1:
    return sample

  def split(logits, rows):
    divides = logits.shape[0] % mesh.size == 0
    spec = jax.P(mesh.axis_names if divides else None)
    return jax.shard_map(
      sample, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )(logits, rows)

  return split


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
