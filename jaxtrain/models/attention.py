"""Attention layer. How keys are stored and attended to is the caller's choice.

Letters: B batch, T query length, S key length, D model, N query heads,
K kv heads, G = N // K, H head dim.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtrain.models import rope as rope_lib
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.layers import Linear
from jaxtrain.models.layers import RMSNorm
from jaxtrain.sharding.partition import Shard
from jaxtrain.sharding.partition import shard_sequences
from jaxtrain.sharding.partition import unsharded
from pallas_kernels.flash_attention import flash_attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerSpec:
  """What an `Attend` must know of the layer that calls it.

  Attributes:
    index: Number of the layer, int32 scalar, traced under `nn.scan`.
    window: Tokens a query sees, itself included, int32 scalar; `None` if no
      layer of the model has a window, and larger than any sequence in a
      full-attention layer of a model where others have one.
    scale: Factor on the logits.
    soft_cap: c of c * tanh(logits / c), or `None`.
  """

  index: Int[Array, '']
  window: Int[Array, ''] | None
  scale: float = dataclasses.field(metadata=dict(static=True))
  soft_cap: float | None = dataclasses.field(metadata=dict(static=True))


@runtime_checkable
class Attend(Protocol):
  """Attends queries to what `cache` holds plus the new keys and values."""

  def __call__(
    self,
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K H'],
    positions: Int[Array, 'B T'],
    cache: Any,
    layer: LayerSpec,
  ) -> tuple[Float[Array, 'B T N H'], Any]: ...


@dataclasses.dataclass(frozen=True)
class Causal:
  """`Attend` of training: causal within segments, nothing cached.

  Attributes:
    segment_ids: `[B, T]` int32; tokens see only their own segment. `None`: one
      segment per row.
    implementation: Backend of `flash_attention`; `None` is the fastest.
    shard: Of the model: each device attends with its own rows and heads.
  """

  segment_ids: Int[Array, 'B T'] | None = None
  implementation: str | None = None
  shard: Shard = unsharded

  def __call__(self, q, k, v, positions, cache, layer):
    del positions  # Rows are in order, so the causal mask needs only the index.

    def run(q, k, v, segment_ids, window):
      return flash_attention(
        q,
        k,
        v,
        segment_ids=segment_ids,
        window=window,
        scale=layer.scale,
        soft_cap=layer.soft_cap,
        implementation=self.implementation,
      )

    run = shard_sequences(run, self.shard)
    return run(q, k, v, self.segment_ids, layer.window), cache


class Attention(nn.Module):
  """Projections, norms and rotation around an injected `attend`."""

  config: ModelConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  shard: Shard = unsharded

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T D'],
    positions: Int[Array, 'B T'],
    sin_cos: tuple[Float[Array, 'B T H2'], Float[Array, 'B T H2']],
    attend: Attend,
    cache: Any,
    layer: LayerSpec,
  ) -> tuple[Float[Array, 'B T D'], Any]:
    c = self.config
    dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)

    def project(name, heads, axis):
      y = Linear(
        features=(heads, c.head_dim),
        axes=('embed', axis, 'head_dim'),
        use_bias=c.qkv_bias,
        name=name,
        **dtypes,
      )(x)
      return self.shard(y, 'batch', 'seq', f'act_{axis}', None)

    q = project('query', c.num_heads, 'heads')
    k = project('key', c.num_kv_heads, 'kv_heads')
    v = project('value', c.num_kv_heads, 'kv_heads')
    if c.qk_norm:
      norm = dict(epsilon=c.norm_eps, plus_one=c.norm_plus_one, **dtypes)
      q = RMSNorm(name='query_norm', **norm)(q)
      k = RMSNorm(name='key_norm', **norm)(k)
    q = rope_lib.rotate(q, *sin_cos)
    k = rope_lib.rotate(k, *sin_cos)
    out, cache = attend(q, k, v, positions, cache, layer)
    out = self.shard(out, 'batch', 'seq', 'act_heads', None)
    y = Linear(
      features=(x.shape[-1],),
      axes=('heads', 'head_dim', 'embed'),
      num_in=2,
      name='out',
      **dtypes,
    )(out)
    return self.shard(y, 'batch', 'seq', 'act_embed'), cache
