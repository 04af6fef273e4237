r"""Compiles a training step for TPUs that need not be there.

python -m experiments.compile_for_tpu --preset=llama3-8b --topology=v5e:4x4 \
    --mesh=fsdp=16 --batch_size=16 --seq_len=4096

Prints the memory of a device by class, the collectives and the compiler's cost;
`--check_hbm_gib=16` fails if more is needed. `--config` takes a training as
train_lm does. Needs `pip install 'onemesh[tpu]'`, no TPU.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
import sys
from typing import Any

from absl import app
from absl import flags
import jax
import jax.numpy as jnp

from experiments import configs
from experiments import training
from jaxtrain import optimizers
from jaxtrain import schedules
from jaxtrain import train_state
from jaxtrain import train_step
from jaxtrain.memory import policies
from jaxtrain.models import families
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import ShardingRules
from jaxtrain.sharding import constrainer
from jaxtrain.sharding import make_mesh
from pallas_kernels import tpu_compiler

_CONFIG = flags.DEFINE_string(
  'config', None, 'Name in experiments/configs/, or path of a .py file.'
)
_PRESET = flags.DEFINE_string(
  'preset', None, "Published model instead of the config's, as llama3-8b."
)
_OVERRIDE = flags.DEFINE_multi_string(
  'override', [], 'key=json, changes the config: optimizer.b2=0.99.'
)
_TOPOLOGY = flags.DEFINE_string(
  'topology', None, 'v5e is one device, v5p:4x4x4 a whole slice.'
)
_MESH = flags.DEFINE_string('mesh', None, "Instead of the config's mesh.")
_RULES = flags.DEFINE_string('rules', None, "Instead of the config's rules.")
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', None, "Rows in the global batch, instead of the config's."
)
_SEQ_LEN = flags.DEFINE_integer(
  'seq_len', None, "Tokens in a row, instead of the config's."
)
_REMAT = flags.DEFINE_string('remat', None, "Instead of the config's policy.")
_CHECK_HBM_GIB = flags.DEFINE_float(
  'check_hbm_gib', None, 'Fail if a device needs more; by default just say so.'
)
_OUTPUT = flags.DEFINE_string('output', None, 'Also write JSON here.')
_CACHE_DIR = flags.DEFINE_string('cache_dir', None, 'Instead of ~/.cache.')
_TIMEOUT_S = flags.DEFINE_float('timeout_s', 1800.0, 'For the compilation.')

# What a preset is trained with where no config says otherwise.
_DEFAULTS = dict(
  seq_len=2048,
  batch_size=16,
  steps=10_000,
  optimizer=dict(name='adamw'),
  schedule=dict(name='warmup_cosine', peak_value=3e-4, warmup_steps=100),
  dtype='bfloat16',
  param_dtype='float32',
  remat='dots_no_batch',
)


@dataclasses.dataclass(frozen=True)
class TrainingStep:
  """Makes a training step on given devices; what `compile_built` calls.

  Attributes:
    config: Keyword arguments of `experiments.training.run`.
  """

  config: Mapping[str, Any]

  def __call__(self, devices: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
    """Returns the jitted step and its abstract state and batch."""
    c = self.config
    mesh = make_mesh(c.get('mesh', ''), devices=devices)
    rules = _rules(c.get('rules', 'default'))
    options = dict(c['schedule'])
    schedule = schedules.get(options.pop('name'))
    rate = schedule(num_steps=c['steps'], **options)
    options = dict(c['optimizer'])
    tx = optimizers.get(options.pop('name'))(learning_rate=rate, **options)
    model = Transformer(
      c['model'],
      dtype=jnp.dtype(c.get('dtype', 'float32')),
      param_dtype=jnp.dtype(c.get('param_dtype', 'float32')),
      remat=policies.get(c.get('remat', 'none')),
      shard=constrainer(mesh, rules),
    )
    step = train_step.make_train_step(
      model,
      tx,
      mesh,
      rules,
      learning_rate=rate,
      **{
        name: c[name]
        for name in ('accumulation', 'max_grad_norm', 'z_loss')
        if name in c
      },
    )
    shardings = train_step.batch_shardings(mesh, rules)
    shape = c['batch_size'], c['seq_len']
    batch = {
      name: jax.ShapeDtypeStruct(
        shape,
        jnp.float32 if name == 'weights' else jnp.int32,
        sharding=sharding,
      )
      for name, sharding in shardings.items()
    }
    state = train_state.state_spec(model, tx, mesh, rules).abstract
    return step, (state, batch)


def memory_classes(compiled: tpu_compiler.Compiled) -> dict[str, int]:
  """Bytes of a device's HBM at the peak, by what they hold.

  'activations' are activations, gradients and the buffers of collectives, as
  many as live at once.
  """
  classes = dict(parameters=0, optimizer=0, batch=0)
  for path, size in compiled.arguments.items():
    is_state = path.startswith('[0]')
    name = 'optimizer' if is_state else 'batch'
    classes['parameters' if '.params' in path else name] += size
  memory = compiled.memory
  classes['padding'] = memory.arguments - sum(classes.values())
  classes['activations'] = memory.peak - memory.arguments
  classes['program'] = memory.generated_code
  return classes


def summary(compiled: tpu_compiler.Compiled, num_tokens: int) -> str:
  """The report, and the memory by class."""
  lines = [compiled.report(), 'memory per device by class']
  for name, size in memory_classes(compiled).items():
    lines.append(f'  {name:<16}{size / 2**30:>10.3f} GiB')
  chip = tpu_compiler.CHIPS[compiled.chip]
  total = compiled.memory.total / 2**30
  verdict = 'fits' if compiled.memory.fits(chip.hbm_gib) else 'does not fit'
  lines.append(
    f'{total:.2f} of {chip.hbm_gib:g} GiB: {verdict}; {num_tokens:,} tokens a '
    'step'
  )
  return '\n'.join(lines)


def _rules(rules):
  if not isinstance(rules, str):
    return ShardingRules(**rules)
  if rules not in PRESETS:
    raise ValueError(f'unknown rules {rules!r}; known: {", ".join(PRESETS)}')
  return PRESETS[rules]


def _preset(name) -> ModelConfig:
  sizes = {}
  for family in families.names():
    sizes.update(families.get(family).sizes)
  if name not in sizes:
    raise ValueError(f'unknown preset {name!r}; known: {", ".join(sizes)}')
  return sizes[name]


def _from_flags():
  if not _TOPOLOGY.value:
    raise ValueError('give --topology=, such as v5e:4x4')
  if not _PRESET.value and not _CONFIG.value:
    raise ValueError(
      f'give --preset=, or --config=, one of {", ".join(configs.names())}'
    )
  config = dict(_DEFAULTS)
  if _CONFIG.value:
    config = configs.load(_CONFIG.value, _OVERRIDE.value)
  elif _OVERRIDE.value:
    raise ValueError('--override changes what --config says; give one')
  if _PRESET.value:
    config['model'] = _preset(_PRESET.value)
  for flag in (_MESH, _RULES, _BATCH_SIZE, _SEQ_LEN, _REMAT):
    if flag.value is not None:
      config[flag.name] = flag.value
  configs.check(config, training.run, training.OPTIONS)
  return config


def _write(compiled, path):
  record = dict(
    topology=compiled.topology,
    num_devices=compiled.num_devices,
    mesh=compiled.mesh_axes,
    memory=memory_classes(compiled),
    total_bytes=compiled.memory.total,
    cost=dataclasses.asdict(compiled.cost),
    collectives=[dataclasses.asdict(c) for c in compiled.collectives],
    versions=compiled.versions,
  )
  pathlib.Path(path).write_text(json.dumps(record, indent=2) + '\n')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  try:
    config = _from_flags()
    compiled = tpu_compiler.compile_built(
      TrainingStep(config),
      topology=_TOPOLOGY.value,
      schedules=False,
      cache_dir=_CACHE_DIR.value,
      timeout_s=_TIMEOUT_S.value,
    )
    print(summary(compiled, config['batch_size'] * config['seq_len']))
    if _OUTPUT.value:
      _write(compiled, _OUTPUT.value)
    if _CHECK_HBM_GIB.value is not None:
      compiled.check(hbm_gib=_CHECK_HBM_GIB.value)
  except (
    ValueError,
    ModuleNotFoundError,
    TimeoutError,
    tpu_compiler.CompileError,
  ) as e:
    sys.exit(f'compile_for_tpu: {e}')


if __name__ == '__main__':
  app.run(main)
