"""Runs one training as a config describes it; a function, no flags."""

from collections.abc import Mapping
import functools
import os
import pathlib
from typing import Any

import optax

from experiments import choices
from jaxtrain import batch_size as batch_size_family
from jaxtrain import data
from jaxtrain import distributed
from jaxtrain import loop
from jaxtrain import schedules
from jaxtrain import train_state
from jaxtrain.checkpoints import convert
from jaxtrain.checkpoints.tokenizer import load_tokenizer
from jaxtrain.memory import policies
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import make_mesh
from jaxtrain.sharding import named_sharding

# What a config may say of the loop and of the step, passed on as it is.
OPTIONS = (
  'accumulation',
  'eval_every',
  'failed_save',
  'keep',
  'keep_best',
  'keep_every',
  'log_every',
  'max_grad_norm',
  'mean_square',
  'noise_scale',
  'progress',
  'save_every',
  'saving',
  'staging_gib',
  'z_loss',
)


def run(
  workdir: str | os.PathLike | None,
  *,
  model: ModelConfig,
  steps: int,
  seq_len: int,
  batch_size: int,
  optimizer: Mapping[str, Any],
  schedule: Mapping[str, Any],
  source: Mapping[str, Any] | str = 'stdlib',
  initial: Mapping[str, Any] | None = None,
  tokenizer: str = 'byte',
  packing: str = 'best_fit',
  mesh: str = '',
  across_slices: str = '',
  rules: str | Mapping[str, Any] = 'default',
  dtype: str = 'float32',
  param_dtype: str = 'float32',
  remat: str = 'none',
  context: str | Mapping[str, Any] | None = 'auto',
  mlp_chunk: int | None = None,
  seed: int = 0,
  grow: Mapping[str, Any] | None = None,
  eval_batches: int = 16,
  **options: Any,
) -> loop.TrainResult:
  """Trains one model; the keyword arguments are what a config may hold.

  Args:
    workdir: Folder of the run; `None` writes nothing.
    model: Architecture.
    steps: Updates of the whole run.
    seq_len: T, tokens in a row.
    batch_size: B, rows in the global batch.
    optimizer: {'name': file in jaxtrain/optimizers/, and its arguments}, see
      `choices.optimizer`.
    schedule: {'name': file in jaxtrain/schedules/, and its arguments};
      `num_steps` is `steps` unless given.
    source: {'name': file in jaxtrain/data/sources/, and its arguments}, or just
      the name.
    initial: Another run's checkpoint to begin with, where `workdir` has none:
      {'directory': its checkpoints/, 'rules': see `checkpoints.remap_rules`,
      'step': which}. It becomes the first of this run. The step goes on, the
      data start anew.
    tokenizer: 'byte', or the path of a tokenizer.json.
    packing: See `make_dataset`.
    mesh: Such as 'data=2,fsdp=2,tensor=2'.
    across_slices: See `make_mesh`.
    rules: Name of a preset, or the arguments of `ShardingRules`.
    dtype: Of activations and matrix products.
    param_dtype: Of parameters, gradients and optimizer.
    remat: Name in jaxtrain/memory/policies.py, such as 'full' or 'memo:0.5'.
    mlp_chunk: See `Transformer`.
    context: How attention deals with sequences that the mesh cuts, see
      `choices.context_parallelism`: 'auto', or such as
      {'name': 'ring', 'layout': 'striped'}.
    seed: Of parameters and data order.
    grow: Lets batches grow with the noise scale, from `batch_size` rows: the
      arguments of `batch_size.growing`, such as {'max_rows': 256}.
    eval_batches: Batches per evaluation on the validation split; 0 never
      evaluates.
    **options: Those of `OPTIONS`, and what is not for a config to say, such as
      'heartbeat' and 'snapshots', see `jaxtrain.loop.train` and
      `jaxtrain.train_step.make_train_step`.

  Returns:
    What `loop.train` returns.

  Raises:
    ValueError: An unknown name (known ones are listed), or sizes that do not
      fit together.
  """
  rules = choices.sharding_rules(rules)
  mesh = make_mesh(mesh, across_slices=across_slices)
  rate = _rate(schedule, steps)
  tx = choices.optimizer(optimizer, rate)
  transformer = _transformer(model, dtype, param_dtype, remat, mlp_chunk)
  dataset = functools.partial(
    _dataset,
    source,
    tokenizer=_tokenizer(tokenizer, model, seq_len),
    seq_len=seq_len,
    batch_size=batch_size,
    seed=seed,
    packing=packing,
    sharding=named_sharding(mesh, rules, 'batch', 'seq'),
  )
  metadata = {'tokenizer': str(tokenizer)}
  train_data = _growing(grow, dataset('train'), batch_size, seq_len)
  where = dict(mesh=mesh, rules=rules, seed=seed)
  made_by = transformer, tx, *where.values()
  _begin(workdir, initial, made_by, train_data, metadata)
  return loop.train(
    transformer,
    tx,
    train_data,
    **where,
    steps=steps,
    workdir=workdir,
    metadata=metadata,
    eval_dataset=dataset('validation') if eval_batches else None,
    eval_batches=max(eval_batches, 1),
    learning_rate=rate,
    context=choices.context_parallelism(context, model, mesh, rules, seq_len),
    **options | ({'noise_scale': True} if grow else {}),
  )


def _growing(options, dataset, rows, seq_len):
  if options is None:
    return dataset
  options = {'name': 'growing', 'rows': rows, 'seq_len': seq_len, **options}
  return choices.named(batch_size_family, 'grow', options, dataset=dataset)


def model_and_optimizer(
  *,
  model: ModelConfig,
  steps: int,
  optimizer: Mapping[str, Any],
  schedule: Mapping[str, Any],
  param_dtype: str = 'float32',
  **others: Any,
) -> tuple[Transformer, optax.GradientTransformation]:
  """What the state of a run is made by; arguments are those of `run`."""
  del others
  tx = choices.optimizer(optimizer, _rate(schedule, steps))
  return _transformer(model, 'float32', param_dtype, 'none', None), tx


def _rate(schedule, steps):
  return choices.named(schedules, 'schedule', {'num_steps': steps, **schedule})


def _begin(workdir, initial, made_by, train_data, metadata):
  """Makes another run's checkpoint the first of this one, if there is one."""
  if initial is None:
    return
  if workdir is None or 'directory' not in initial:
    raise ValueError("'initial' needs a workdir, and the 'directory' to read")
  if unknown := initial.keys() - {'directory', 'rules', 'step'}:
    raise ValueError(
      f"'initial' has unknown {', '.join(unknown)}; known: directory, rules, "
      'step'
    )
  model, tx, mesh, sharding, seed = made_by
  spec = train_state.state_spec(model, tx, mesh, sharding)

  def new():
    return vars(train_state.init_state(model, tx, mesh, sharding, seed=seed))

  convert.begin(
    pathlib.Path(workdir) / 'checkpoints',
    initial['directory'],
    initial.get('rules', ()),
    vars(spec.abstract),
    new,
    step=initial.get('step'),
    data_state=iter(train_data).get_state(),
    config=model.config,
    metadata=metadata,
  )


def _transformer(model, dtype, param_dtype, remat, mlp_chunk):
  return Transformer(
    model,
    dtype=choices.float_dtype('dtype', dtype),
    param_dtype=choices.float_dtype('param_dtype', param_dtype),
    remat=policies.get(remat),
    mlp_chunk=mlp_chunk,
  )


def _dataset(source, split, sharding, **options):
  share = distributed.batch_share(sharding)
  source = {'name': source} if isinstance(source, str) else source
  documents = choices.named(data, 'source', source, split=split)
  return data.make_dataset(
    documents, process_index=share[0], process_count=share[1], **options
  )


def _tokenizer(name, model, seq_len):
  """The tokenizer, whose ids and rows the model has room for."""
  text = load_tokenizer(name)
  if text.vocab_size > model.vocab_size:
    raise ValueError(
      f'the tokenizer has {text.vocab_size} ids, more than model.vocab_size='
      f'{model.vocab_size}'
    )
  if seq_len > model.max_seq_len:
    raise ValueError(
      f'seq_len={seq_len} is more than model.max_seq_len={model.max_seq_len}'
    )
  return text
