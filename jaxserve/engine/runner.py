"""Device side of the engine: parameters, pages, and the compiled steps.

One program per token bucket, compiled before the first request and called as a
compiled object: a step whose shapes no program has is an error, never a
compilation.
"""

import concurrent.futures
import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import attention
from jaxserve import samplers
from jaxserve.cache import pages as pages_lib
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.layout import Layout
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import ShardingRules
from jaxtrain.sharding import constrainer
from jaxtrain.sharding import named_sharding


@dataclasses.dataclass(frozen=True)
class StepResult:
  """Tokens of one step, on their way to the host.

  `packed [U, 2 + 2n]` int32: token, bits of its log-probability, then ids and
  bits of the n likeliest.
  """

  packed: jax.Array
  num_logprobs: int

  def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Waits for tokens `[U]`, logprobs `[U]`, top ids and top logprobs."""
    packed, n = np.asarray(self.packed), self.num_logprobs
    floats = packed.view(np.float32)
    return (
      packed[:, 0],
      floats[:, 1],
      packed[:, 2 : 2 + n],
      floats[:, 2 + n :],
    )


class Runner:
  """Owns the parameters' programs and the page pool.

  Args:
    config: Architecture.
    params: Parameter tree, already on `mesh`.
    mesh: Where it runs.
    rules: How the parameters were laid out.
    engine: Sizes.
    num_pages: Pages in the pool.
    max_seq_len: Longest request, in tokens.
    dtype: Compute dtype.
  """

  def __init__(
    self,
    config: ModelConfig,
    params: Any,
    mesh: jax.sharding.Mesh,
    rules: ShardingRules,
    engine: EngineConfig,
    *,
    num_pages: int,
    max_seq_len: int,
    dtype: Any,
  ):
    self._engine = engine
    # The flat batch of one step is not split; heads and features are.
    rules = serving_rules(rules, mesh, config)
    self._shard = constrainer(mesh, rules)
    self._model = Transformer(config, dtype=dtype, shard=self._shard)
    self._sample = samplers.get(engine.sampler)()
    self._make_attend = attention.get(engine.attention)
    self._params = params
    self._replicated = named_sharding(mesh, rules)
    pool = named_sharding(mesh, rules, None, None, 'act_kv_heads', None, None)
    self._pages = pages_lib.allocate(
      config.num_layers,
      num_pages,
      engine.page_size,
      num_stored_heads(rules, mesh, config),
      config.head_dim,
      dtype if engine.kv_dtype is None else engine.kv_dtype,
      pool,
    )
    self._last_tokens = jax.device_put(
      np.zeros(engine.max_num_requests, np.int32), self._replicated
    )
    self.num_logprobs = min(engine.max_logprobs, config.vocab_size)
    pages_per_row = -(-max_seq_len // engine.page_size)
    self.layouts = {
      t: Layout(t, engine.max_num_requests, pages_per_row)
      for t in engine.buckets
    }
    start = time.perf_counter()
    self._programs = self._compile()
    self.compile_s = time.perf_counter() - start

  @property
  def num_programs(self) -> int:
    return len(self._programs)

  @property
  def cache_bytes(self) -> int:
    return self._pages.k.nbytes + self._pages.v.nbytes

  def layout_for(self, num_tokens: int) -> Layout:
    """The smallest bucket that holds `num_tokens`."""
    return self.layouts[min(t for t in self.layouts if t >= num_tokens)]

  def run(self, layout: Layout, buffer: np.ndarray) -> StepResult:
    """Dispatches one step and starts the copy of its tokens; does not wait."""
    self._pages, self._last_tokens, packed = self._programs[layout.num_tokens](
      self._params,
      self._pages,
      self._last_tokens,
      jax.device_put(buffer, self._replicated),
    )
    packed.copy_to_host_async()
    return StepResult(packed, self.num_logprobs)

  def close(self) -> None:
    """Frees the page pool; parameters belong to the caller."""
    for x in (*jax.tree.leaves(self._pages), self._last_tokens):
      x.delete()
    self._programs = {}
    self._params = None

  def _compile(self):
    def lower(layout):
      buffer = jax.ShapeDtypeStruct(
        (layout.size,), jnp.int32, sharding=self._replicated
      )
      step = jax.jit(
        functools.partial(self._step, layout), donate_argnums=(1, 2)
      )
      return step.lower(self._params, self._pages, self._last_tokens, buffer)

    lowered = {t: lower(layout) for t, layout in self.layouts.items()}
    with concurrent.futures.ThreadPoolExecutor() as pool:
      compiled = pool.map(lambda x: x.compile(), lowered.values())
      return dict(zip(lowered, compiled, strict=True))

  def _step(self, layout, params, pages, last_tokens, buffer):
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
    pin = lambda x: jax.lax.with_sharding_constraint(x, self._replicated)
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
