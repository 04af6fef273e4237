"""Programs to compile for TPUs that need not be there: training and serving.

Each is a picklable object that `tpu_compiler.compile_built` calls with the
devices; it gives the very function that `jaxtrain` or `jaxserve` runs.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments import choices
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.layout import Layout
from jaxserve.engine.step import Step
from jaxtrain import schedules
from jaxtrain import train_state
from jaxtrain import train_step
from jaxtrain.memory import policies
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import constrainer
from jaxtrain.sharding import make_mesh
from jaxtrain.sharding import param_shardings
from jaxtrain.sharding.mesh import AXES
from jaxtrain.sharding.mesh import parse
from jaxtrain.sharding.partition import fit_rules

# What a preset is trained with where no config says otherwise.
TRAINING = dict(
  seq_len=2048,
  batch_size=16,
  steps=10_000,
  optimizer=dict(name='adamw'),
  schedule=dict(name='warmup_cosine', peak_value=3e-4, warmup_steps=100),
  dtype='bfloat16',
  param_dtype='float32',
  remat='dots_no_batch',
)
# Classes of memory, see `tpu_compiler.Compiled.memory_by_class`.
TRAINING_CLASSES = {
  '[0].params': 'parameters',
  '[0].opt_state': 'optimizer state',
  '[1]': 'batch',
}
SERVING_CLASSES = {'[0]': 'parameters', '[1]': 'KV pages', '[2]': 'step inputs'}
SERVING_CLASSES['[3]'] = SERVING_CLASSES['[2]']
# What `experiments.training.run` passes on to `make_train_step` as it is.
_STEP_OPTIONS = (
  'accumulation',
  'max_grad_norm',
  'mean_square',
  'noise_scale',
  'z_loss',
)


@dataclasses.dataclass(frozen=True)
class TrainingStep:
  """Makes a training step on given devices.

  Attributes:
    config: Keyword arguments of `experiments.training.run`.
    offload: Keeps the optimizer state in the host's memory between steps.
  """

  config: Mapping[str, Any]
  offload: bool = False

  def __call__(self, devices: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
    """Returns the jitted step and its abstract state and batch."""
    c = self.config
    mesh = make_mesh(c.get('mesh', ''), devices=devices)
    rules = choices.sharding_rules(c.get('rules', 'default'))
    rate = choices.named(
      schedules, 'schedule', {'num_steps': c['steps'], **c['schedule']}
    )
    tx = choices.optimizer(c['optimizer'], rate)
    dtype = lambda name: choices.float_dtype(name, c.get(name, 'float32'))
    model = Transformer(
      c['model'],
      dtype=dtype('dtype'),
      param_dtype=dtype('param_dtype'),
      remat=policies.get(c.get('remat', 'none')),
      mlp_chunk=c.get('mlp_chunk'),
      shard=constrainer(mesh, rules),
    )
    step = train_step.make_train_step(
      model,
      tx,
      mesh,
      rules,
      learning_rate=rate,
      context=choices.context_parallelism(
        c.get('context', 'auto'), c['model'], mesh, rules, c['seq_len']
      ),
      **{name: c[name] for name in _STEP_OPTIONS if name in c},
    )
    shape = c['batch_size'], c['seq_len']
    batch = {
      name: jax.ShapeDtypeStruct(
        shape,
        jnp.float32 if name == 'weights' else jnp.int32,
        sharding=sharding,
      )
      for name, sharding in train_step.batch_shardings(mesh, rules).items()
    }
    state = train_state.state_spec(model, tx, mesh, rules).abstract
    return (
      _offloaded(step, state, batch)
      if self.offload
      else (
        step,
        (state, batch),
      )
    )

  def values(self, args: Any) -> list[np.ndarray | None]:
    """Values that steer kernels: every row is one sequence."""
    shape = self.config['batch_size'], self.config['seq_len']
    known = {
      'segment_ids': np.ones(shape, np.int32),
      'positions': np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
    }
    state, _ = args
    batch = {name: known.get(name) for name in sorted(train_step.BATCH_KEYS)}
    return [*[None] * len(jax.tree.leaves(state)), *batch.values()]

  @property
  def tokens(self) -> int:
    """Of one step, over all devices."""
    return self.config['batch_size'] * self.config['seq_len']

  def model_flops(self, full_square: bool) -> float:
    """FLOPs that a step needs, recomputation not counted.

    Args:
      full_square: Attention as PaLM's appendix B counts it, not its causal
        half.
    """
    model, seq_len = self.config['model'], self.config['seq_len']
    return self.tokens * model.train_flops_per_token(
      seq_len, full_square=full_square
    )

  def state_bytes(self, num_devices: int) -> float:
    """What parameters and AdamW's two moments take on a device at least."""
    c = self.config
    size = choices.float_dtype('', c.get('param_dtype', 'float32')).itemsize
    sizes = mesh_sizes(c.get('mesh', ''), num_devices)
    rules = choices.sharding_rules(c.get('rules', 'default'))
    axes = {
      axis
      for name in ('embed', 'mlp', 'heads', 'vocab', 'expert')
      for axis in rules.table.get(name, ())
    }
    shards = math.prod(sizes.get(axis, 1) for axis in axes)
    copies = 1 if self.offload else 3
    return copies * size * c['model'].num_params / shards


@dataclasses.dataclass(frozen=True)
class ServingStep:
  """Makes the program of one token bucket on given devices.

  Attributes:
    model: Architecture.
    engine: Sizes; `num_pages=None` has room for `max_seq_len` in every row.
    num_tokens: The bucket; a decode step's is `engine.max_num_requests`.
    mesh: Such as 'tensor=4'.
    rules: Name of a preset, or the arguments of `ShardingRules`.
    dtype: Of parameters and activations.
  """

  model: ModelConfig
  engine: EngineConfig
  num_tokens: int
  mesh: str = ''
  rules: str | Mapping[str, Any] = 'tensor_parallel'
  dtype: str = 'bfloat16'

  def __call__(self, devices: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
    """Returns the jitted step and its abstract arguments."""
    mesh = make_mesh(self.mesh, devices=devices)
    dtype = choices.float_dtype('dtype', self.dtype)
    max_seq_len = self.engine.max_seq_len or self.model.max_seq_len
    boxed = jax.eval_shape(
      lambda: Transformer(self.model, param_dtype=dtype).init(
        jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
      )
    )['params']
    rules = fit_rules(boxed, mesh, choices.sharding_rules(self.rules))
    rows = self.engine.max_num_requests
    step = Step(
      self.model,
      mesh,
      rules,
      self.engine,
      num_pages=self.engine.num_pages
      or rows * -(-max_seq_len // self.engine.page_size),
      max_seq_len=max_seq_len,
      dtype=dtype,
    )
    params = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      nn.unbox(boxed),
      param_shardings(boxed, mesh, rules),
    )
    layout = step.layouts[self.num_tokens]
    return step.jitted(layout), (params, *step.abstract_args(layout))

  def values(self, args: Any) -> list[np.ndarray | None]:
    """A step at its longest: full rows decode, the last takes the rest.

    Every row has as many tokens as the model or the pool allows, in pages that
    lie one after the other.
    """
    rows, page_size = self.engine.max_num_requests, self.engine.page_size
    num_pages = jax.tree.leaves(args[1])[0].shape[1]
    longest = min(
      self.engine.max_seq_len or self.model.max_seq_len,
      num_pages // rows * page_size,
    )
    layout = Layout(
      self.num_tokens,
      rows,
      -(-(self.engine.max_seq_len or self.model.max_seq_len) // page_size),
    )
    used = min(rows, self.num_tokens)
    lengths = np.ones(used, np.int32)
    lengths[-1] = min(self.num_tokens - used + 1, longest)
    buffer, views = layout.empty()
    total = int(lengths.sum())
    per_row = longest // page_size
    views['query_start'][1 : used + 1] = np.cumsum(lengths)
    views['query_start'][used + 1 :] = total
    views['kv_len'][:used] = longest
    views['page_table'][:, :per_row] = np.arange(rows * per_row).reshape(
      rows, per_row
    )
    row = np.repeat(np.arange(used), lengths)
    first = views['query_start'][:used]
    position = longest - lengths[row] + np.arange(total) - first[row]
    views['token_row'][:total] = row
    views['positions'][:total] = position
    views['slot'][:total] = (
      row * per_row + position // page_size
    ) * page_size + position % page_size
    return [*[None] * (len(jax.tree.leaves(args)) - 1), buffer]


def mesh_sizes(spec: str, num_devices: int) -> dict[str, int]:
  """Sizes of all mesh axes of a description such as 'fsdp=-1,tensor=2'."""
  sizes = parse(spec)
  known = math.prod(n for n in sizes.values() if n > 0)
  rest = max(num_devices // known, 1)
  return {
    axis: rest if sizes.get(axis, 1) < 0 else sizes.get(axis, 1)
    for axis in AXES
  }


def _offloaded(step, state, batch):
  """The step with its optimizer state in host memory before and after."""

  def of(kind, tree):
    return jax.tree.map(lambda x: x.sharding.with_memory_kind(kind), tree)

  on_device = of('device', state.opt_state)
  # Scalars stay: they save nothing.
  on_host = jax.tree.map(
    lambda x, s: s.with_memory_kind('pinned_host') if x.ndim else s,
    state.opt_state,
    on_device,
  )
  held = dataclasses.replace(
    state,
    opt_state=jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      state.opt_state,
      on_host,
    ),
  )

  def run(state, batch):
    opt_state = jax.device_put(state.opt_state, on_device)
    new, metrics = step(dataclasses.replace(state, opt_state=opt_state), batch)
    opt_state = jax.device_put(new.opt_state, on_host)
    return dataclasses.replace(new, opt_state=opt_state), metrics

  shardings = jax.tree.map(lambda x: x.sharding, held)
  return jax.jit(run, donate_argnums=0, out_shardings=(shardings, None)), (
    held,
    batch,
  )
