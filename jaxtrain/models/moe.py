"""Mixture of experts: top-k routing, no capacity, no dropped token.

Tokens are sorted by expert and every expert multiplies just its own run of
rows, as MegaBlocks does (Gale et al., https://arxiv.org/abs/2211.15841).
Experts may be sharded: a device keeps the rows of its own experts and the
partial results are summed.

Letters: A tokens on a device, D model, F feed-forward, E experts, R = A * k
routed rows.
"""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtrain.models.config import MoE
from jaxtrain.models.layers import ACTIVATIONS
from jaxtrain.models.layers import Linear
from jaxtrain.sharding.partition import Shard
from jaxtrain.sharding.partition import shard_experts
from jaxtrain.sharding.partition import unsharded
from pallas_kernels.grouped_matmul import grouped_matmul


class MoEMLP(nn.Module):
  """Gated MLP of which each token uses its k best experts."""

  moe: MoE
  activation: str
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  shard: Shard = unsharded

  @nn.compact
  def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    m, d = self.moe, x.shape[-1]
    router_logits = Linear(
      features=(m.num_experts,),
      axes=('embed', None),
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name='router',
    )(x)
    weights, experts = route(router_logits, m)

    def table(name, shape, axes):
      init = nn.initializers.variance_scaling(
        1.0, 'fan_in', 'truncated_normal', 1, 2, batch_axis=0
      )
      boxed = nn.with_logical_partitioning(init, axes)
      return self.param(name, boxed, shape, self.param_dtype).astype(self.dtype)

    up_axes = ('expert', 'embed', 'mlp')
    tables = (
      table('gate', (m.num_experts, d, m.mlp_dim), up_axes),
      table('up', (m.num_experts, d, m.mlp_dim), up_axes),
      table('down', (m.num_experts, m.mlp_dim, d), ('expert', 'mlp', 'embed')),
    )
    run = functools.partial(experts_mlp, activation=self.activation)
    y = shard_experts(run, self.shard)(x, weights, experts, tables)
    return self.shard(y, 'batch', 'seq', 'act_embed')


def route(
  router_logits: Float[Array, 'B T E'], moe: MoE
) -> tuple[Float[Array, 'B T k'], Int[Array, 'B T k']]:
  """Weights and indices of the k experts of each token.

  The softmax over all experts is float32 and comes before the choice
  (Mixtral's softmax over the chosen logits is the same with
  `normalize_weights`).
  """
  probs = jax.nn.softmax(router_logits.astype(jnp.float32), axis=-1)
  weights, experts = jax.lax.top_k(probs, moe.num_experts_per_token)
  if moe.normalize_weights:
    weights = weights / weights.sum(axis=-1, keepdims=True)
  return weights, experts


def experts_mlp(
  x: Float[Array, 'B T D'],
  weights: Float[Array, 'B T k'],
  experts: Int[Array, 'B T k'],
  tables: tuple[jax.Array, jax.Array, jax.Array],
  *,
  activation: str,
  first_expert: Int[Array, ''] | int = 0,
) -> Float[Array, 'B T D']:
  """Weighted sum over the chosen experts that `tables` holds.

  Args:
    x: Tokens.
    weights: Router weights of the chosen experts.
    experts: Their numbers, 0..E-1.
    tables: gate and up `[e, D, F]`, down `[e, F, D]`: experts `first_expert`..
      `first_expert + e - 1`. Tokens routed elsewhere contribute zero.
    activation: Name of the gate's activation.
    first_expert: Number of the first expert held here.

  Returns:
    The sum, in the dtype of `x`.
  """
  gate, up, down = tables
  held, k = gate.shape[0], experts.shape[-1]
  x_AD = x.reshape(-1, x.shape[-1])
  local_R = experts.reshape(-1) - first_expert
  is_here_R = (local_R >= 0) & (local_R < held)
  # Rows of other devices' experts sort to the end, past every group.
  local_R = jnp.where(is_here_R, local_R, held)
  order_R = jnp.argsort(local_R)
  token_R = order_R // k
  group_sizes = jnp.bincount(local_R, length=held + 1)[:held].astype(jnp.int32)
  rows_RD = x_AD[token_R]
  hidden_RF = ACTIVATIONS[activation](
    grouped_matmul(rows_RD, gate, group_sizes)
  ) * grouped_matmul(rows_RD, up, group_sizes)
  out_RD = grouped_matmul(hidden_RF.astype(x.dtype), down, group_sizes)
  weight_R = jnp.where(is_here_R, weights.reshape(-1), 0.0)[order_R]
  out_RD = out_RD.astype(jnp.float32) * weight_R[:, None]
  y_AD = jnp.zeros(x_AD.shape, jnp.float32).at[token_R].add(out_RD)
  return y_AD.reshape(x.shape).astype(x.dtype)
