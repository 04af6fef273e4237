"""One jitted, donated training step, the same for every mesh.

Or two programs, one that reads the state and one that updates it, so that the
state can be copied while the first runs.

Parallelism is in the shardings of the state and of the batch, which the rules
give; the step is single-device code that XLA partitions (GSPMD, Xu et al.,
https://arxiv.org/abs/2105.04663).
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import optax

from jaxtrain import gradient_statistics
from jaxtrain import train_state as train_state_lib
from jaxtrain.models.attention import Causal
from jaxtrain.models.transformer import output_head
from jaxtrain.parallel.context.base import Context
from jaxtrain.sharding.partition import constrainer
from jaxtrain.sharding.partition import gather
from jaxtrain.sharding.partition import named_sharding
from jaxtrain.sharding.partition import unsharded
from jaxtrain.sharding.rules import ShardingRules
from jaxtrain.train_state import TrainState
from pallas_kernels.common import dispatch
from pallas_kernels.linear_cross_entropy import linear_cross_entropy

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
BATCH_KEYS = ('tokens', 'targets', 'positions', 'segment_ids', 'weights')


def batch_shardings(
  mesh: Mesh, rules: ShardingRules
) -> dict[str, NamedSharding]:
  """Shardings of the `[B, T]` arrays of a batch."""
  sharding = named_sharding(mesh, rules, 'batch', 'seq')
  return {name: sharding for name in BATCH_KEYS}


def make_train_step(
  model: nn.Module,
  tx: optax.GradientTransformation,
  mesh: Mesh,
  rules: ShardingRules,
  *,
  accumulation: int = 1,
  max_grad_norm: float | None = 1.0,
  z_loss: float = 0.0,
  learning_rate: optax.Schedule | None = None,
  context: Context | None = None,
  noise_scale: bool = False,
  mean_square: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Builds `step(state, batch) -> (state, metrics)`, jitted, `state` donated.

  The loss is the mean over the batch's weights of cross-entropy and z-loss. If
  it or the gradient is not finite the state comes back as it was, step number
  included.

  Args:
    model: The `Transformer`, made with `shard=constrainer(mesh, rules)`.
    tx: Optimizer; sees clipped float32 gradients.
    mesh: Mesh of the state.
    rules: Logical to mesh axes.
    accumulation: Number of equal parts of the batch whose gradients are added
      up one after the other. The result is that of the whole batch.
    max_grad_norm: Gradients with a larger global norm are scaled down to it;
      `None` never.
    z_loss: Factor of the z-loss (https://arxiv.org/abs/2204.02311, section 5).
    learning_rate: The schedule inside `tx`, to be reported as 'learning_rate'.
    context: How attention deals with sequences that the mesh cuts, such as
      `Context(parallel.context.get('ring')())`; `None` exchanges heads, or
      gathers whole sequences where there are too few of them.
    noise_scale: Whether metrics have what `batch_size.noise_scale` estimates
      from, see `gradient_statistics.metrics`. Groups are the parts of
      `accumulation`; if it is 1, what each device of a mesh has that only
      splits the batch.
    mean_square: Whether `tx.update` is given `mean_square`, the elementwise
      mean over the same groups of squared (clipped) gradients.

  Returns:
    The step. Batches are dicts of `BATCH_KEYS`, `[B, T]`, sharded by
    `batch_shardings`. Metrics are float32 scalars: 'loss' (z-loss included),
    'nll' (without), 'accuracy', 'grad_norm' (before clipping), 'weight' (sum of
    the batch's weights) and 'finite' (1 or 0).

  Raises:
    ValueError: `accumulation` below 1, or a batch that it or the mesh does not
      divide (when the step is traced); `noise_scale` or `mean_square` without
      groups.
  """
  spec, gradients, update_state, _ = _halves(
    model,
    tx,
    mesh,
    rules,
    accumulation=accumulation,
    max_grad_norm=max_grad_norm,
    z_loss=z_loss,
    learning_rate=learning_rate,
    context=context,
    noise_scale=noise_scale,
    mean_square=mean_square,
  )

  def step(state, batch):
    return update_state(state, gradients(state, batch))

  return jax.jit(
    step,
    in_shardings=(spec.shardings, batch_shardings(mesh, rules)),
    out_shardings=(spec.shardings, NamedSharding(mesh, P())),
    donate_argnums=0,
  )


@dataclasses.dataclass(frozen=True)
class SplitStep:
  """A training step as two jitted programs.

  Attributes:
    gradients: `(state, batch) -> gradients`, float32 and sharded as the
      parameters, and what else `update` needs. `state` is not donated.
    update: `(state, gradients) -> (state, metrics)`, `state` donated. The
      gradients are not: no output could have their memory.
  """

  gradients: Callable[[TrainState, Batch], Any]
  update: Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def make_split_step(
  model: nn.Module,
  tx: optax.GradientTransformation,
  mesh: Mesh,
  rules: ShardingRules,
  **options: Any,
) -> SplitStep:
  """Builds the two programs of a step; arguments as of `make_train_step`.

  They do what its one program does, up to rounding: XLA fuses each on its own.
  """
  spec, gradients, update_state, out = _halves(
    model, tx, mesh, rules, **options
  )
  return SplitStep(
    jax.jit(
      gradients,
      in_shardings=(spec.shardings, batch_shardings(mesh, rules)),
      out_shardings=out,
    ),
    jax.jit(
      update_state,
      in_shardings=(spec.shardings, out),
      out_shardings=(spec.shardings, NamedSharding(mesh, P())),
      donate_argnums=0,
    ),
  )


def _halves(
  model,
  tx,
  mesh,
  rules,
  *,
  accumulation=1,
  max_grad_norm=1.0,
  z_loss=0.0,
  learning_rate=None,
  context=None,
  noise_scale=False,
  mean_square=False,
):
  """The two halves of a step, not jitted, and what is between them.

  Returns:
    The spec of the state, `(state, batch) -> found`, `(state, found) -> (state,
    metrics)`, and the shardings of `found`.
  """
  if accumulation < 1:
    raise ValueError(f'accumulation={accumulation} must be at least 1')
  spec = train_state_lib.state_spec(model, tx, mesh, rules)
  like_params, replicated = spec.shardings.params, NamedSharding(mesh, P())
  shardings = dict(grads=like_params, sums=replicated, statistics=None)
  statistics = None
  if noise_scale or mean_square:
    statistics = functools.partial(
      gradient_statistics.of_group, elementwise=mean_square
    )
    shardings['statistics'] = dict(square=replicated, num_groups=replicated)
    if mean_square:
      shardings['statistics']['squares'] = like_params
    if accumulation == 1:
      gradient_statistics.check_devices(mesh, rules, like_params)
  options = dict(rules=rules, z_loss=z_loss, context=context)
  gradient_fn = _gradient_fn(model, mesh, accumulation, statistics, **options)

  def gradients(state, batch):
    _check_batch(batch, mesh, rules, accumulation)
    key = jax.random.fold_in(
      jax.random.wrap_key_data(state.rng, impl='threefry2x32'), state.step
    )
    with dispatch.lowered_for(mesh):
      grads, sums, found = gradient_fn(state.params, batch, key)
    return dict(grads=grads, sums=sums, statistics=found)

  def update_state(state, found):
    state, metrics = update(
      tx,
      state,
      found['grads'],
      found['sums'],
      max_grad_norm=max_grad_norm,
      rate=learning_rate,
      statistics=found['statistics'] if mean_square else None,
    )
    if noise_scale:
      metrics |= gradient_statistics.metrics(
        found['statistics'], metrics['weight'], metrics['grad_norm']
      )
    return state, metrics

  return spec, gradients, update_state, shardings


def update(
  tx: optax.GradientTransformation,
  state: TrainState,
  grads: Any,
  sums: Metrics,
  *,
  max_grad_norm: float | None,
  rate: optax.Schedule | None,
  statistics: Any = None,
) -> tuple[TrainState, Metrics]:
  """The update of `make_train_step`, which explains the arguments.

  Args:
    tx: Optimizer.
    state: Before.
    grads: Float32 gradients of the summed loss.
    sums: Of `loss_sums`, over the whole batch.
    max_grad_norm: Of the gradients of the mean.
    rate: The schedule inside `tx`.
    statistics: Of `gradient_statistics`, elementwise, if `tx` is to have their
      `mean_square`.
  """
  weight = jnp.maximum(sums['weight'], 1e-8)
  norm = optax.tree.norm(grads) / weight
  clip = 1.0
  if max_grad_norm is not None:
    clip = max_grad_norm / jnp.maximum(norm, max_grad_norm)
  scale, extra = 1.0 / weight * clip, {}
  if statistics is not None:
    tx = optax.with_extra_args_support(tx)
    extra['mean_square'] = gradient_statistics.mean_square(
      statistics, weight, clip
    )
  grads = jax.tree.map(lambda g: g * scale, grads)
  updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
  loss = (sums['nll'] + sums['z_loss']) / weight
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  new = TrainState(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
    rng=state.rng,
  )
  new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)
  metrics = dict(
    loss=loss,
    nll=sums['nll'] / weight,
    accuracy=sums['correct'] / weight,
    grad_norm=norm,
    weight=sums['weight'],
    finite=finite.astype(jnp.float32),
  )
  if rate is not None:
    metrics['learning_rate'] = jnp.asarray(rate(state.step), jnp.float32)
  return new, metrics


def make_eval_step(
  model: nn.Module,
  mesh: Mesh,
  rules: ShardingRules,
  context: Context | None = None,
) -> Callable[[Any, Batch], Metrics]:
  """Builds `step(params, batch) -> sums`, jitted; `context` as in training.

  Returns:
    The step; its sums are float32 scalars 'nll', 'correct' and 'weight', to be
    added over batches and divided by the weight at the end.
  """

  def step(params, batch):
    _check_batch(batch, mesh, rules, 1)
    with dispatch.lowered_for(mesh):
      _, sums = loss_sums(
        model,
        params,
        batch,
        jax.random.key(0),
        mesh=mesh,
        rules=rules,
        context=context,
      )
    return {name: sums[name] for name in ('nll', 'correct', 'weight')}

  return jax.jit(step, out_shardings=NamedSharding(mesh, P()))


def loss_sums(
  model: nn.Module,
  params: Any,
  batch: Batch,
  noise: jax.Array,
  *,
  mesh: Mesh | None,
  rules: ShardingRules,
  z_loss: float = 0.0,
  context: Context | None = None,
) -> tuple[jax.Array, Metrics]:
  """Loss of a batch summed over its weights, and `linear_cross_entropy`'s sums.

  Args:
    model: The `Transformer`.
    params: Its parameters.
    batch: See `make_train_step`.
    noise: Random key for modules that want one.
    mesh: Mesh of the arrays; `None` is one device's own.
    rules: Logical to mesh axes.
    z_loss: Factor of the z-loss.
    context: See `make_train_step`.
  """
  shard = constrainer(mesh, rules)
  if context is None:
    attend = Causal(batch['segment_ids'], shard=shard)
  else:
    batch = context.arrange(batch, shard)
    attend = context.attend(batch['segment_ids'], shard)
  hidden, _ = model.apply(
    {'params': params},
    batch['tokens'],
    batch['positions'],
    attend,
    unembed=False,
    rngs={'dropout': noise},
  )
  # Whole along D, so that logits need no sum over devices. One gather a step.
  head = gather(output_head(params), shard, (None, 'vocab'), ('embed', 'vocab'))
  return _loss(
    (hidden, head, batch['targets'], batch['weights']),
    mesh,
    rules,
    z_loss=z_loss,
    logit_soft_cap=model.config.logit_soft_cap,
  )


def _loss(arrays, mesh, rules, **static):
  """`linear_cross_entropy` of each device's tokens and logits, summed."""
  if mesh is None or mesh.size == 1:
    return linear_cross_entropy(*arrays, **static)
  vocab = rules.table.get('vocab', ())
  # Shards of the vocabulary see the same tokens.
  batch, seq = (
    tuple(a for a in rules.table.get(name, ()) if a not in vocab)
    for name in ('batch', 'seq')
  )
  rules = rules.replace(batch=batch, seq=seq)

  def local(*arrays):
    sums = linear_cross_entropy(*arrays, vocab_axes=vocab, **static)
    return jax.lax.psum(sums, batch + seq)

  tokens = rules.spec(('batch', 'seq'))
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(
      rules.spec(('batch', 'seq', None)),
      rules.spec((None, 'vocab')),
      tokens,
      tokens,
    ),
    out_specs=P(),
  )(*arrays)


def _gradient_fn(model, mesh, accumulation, statistics, *, rules, **options):
  """`_gradients` of parameters, batch and noise."""
  if statistics is None or accumulation > 1:
    loss_fn = functools.partial(
      loss_sums, model, mesh=mesh, rules=rules, **options
    )
    return functools.partial(_gradients, loss_fn, accumulation, statistics)
  loss_fn = functools.partial(
    loss_sums, model.clone(shard=unsharded), mesh=None, rules=rules, **options
  )
  return gradient_statistics.over_devices(
    functools.partial(_gradients, loss_fn, accumulation, statistics),
    mesh,
    rules,
  )


def _gradients(loss_fn, accumulation, statistics, params, batch, noise):
  """Of the whole batch: float32 gradients of the summed loss, and the sums.

  And `statistics(grads, weight)` of its parts, added up, if wanted.
  """
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

  def part(batch, noise):
    (_, sums), grads = grad_fn(params, batch, noise)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    if statistics is None:
      return grads, sums, None
    return grads, sums, statistics(grads, sums['weight'])

  if accumulation == 1:
    return part(batch, noise)

  def add(total, part_input):
    return jax.tree.map(jnp.add, total, part(*part_input)), None

  # Row r goes to part r % accumulation: every shard has rows in every part.
  split = lambda a: jnp.moveaxis(
    a.reshape(a.shape[0] // accumulation, accumulation, *a.shape[1:]), 1, 0
  )
  parts = jax.tree.map(split, batch), jax.random.split(noise, accumulation)
  first = jax.eval_shape(part, batch, noise)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)
  return jax.lax.scan(add, zeros, parts)[0]


def _check_batch(batch, mesh, rules, accumulation):
  if missing := set(BATCH_KEYS) - set(batch):
    raise ValueError(f'the batch lacks {", ".join(sorted(missing))}')
  b, t = batch['tokens'].shape
  rows, columns = train_state_lib.batch_shards(mesh, rules)
  if b % (rows * accumulation) or t % columns:
    raise ValueError(
      f'a batch of {b} rows of {t} tokens does not divide into {rows} x '
      f'{columns} shards of the mesh and accumulation={accumulation} parts'
    )
