r"""Makes one checkpoint of another: names, shapes, dtype, optimizer, model.

See what would happen, then do it:

python -m experiments.convert_checkpoint --source=runs/a/checkpoints \
    --rules='[{"rule": "pad", "from": "embed/embedding", "dim": 0,
               "multiple": 128},
              {"rule": "pad", "from": "unembed/kernel", "dim": 1,
               "multiple": 128}]' \
    --model=vocab_size=384 --dry_run
python -m experiments.convert_checkpoint ... --target=runs/b/checkpoints

Where only the mesh is another, nothing needs converting: training and serving
read any checkpoint onto any mesh. This is for what a mesh does not say:

* other names, layers stacked or not, projections fused or not, other shapes:
  --rules, a list of JSON objects or the path of a .json file, or of a .py file
  with a list RULES. The rules and their arguments are in
  jaxtrain/checkpoints/{remap_rules,remap_joins,remap_language}.py;
* another dtype of parameters, and of moments that share it: --dtype=bfloat16;
* parameters alone, for serving: --params_only;
* another optimizer: --config (and --override) as for experiments.train_lm, and
  the rule {"rule": "optimizer"}; leaves that the checkpoint lacks are those of
  a new run, where {"rule": "init", "from": ...} says so;
* another architecture in name: --model=vocab_size=384 changes the one stored
  with the checkpoint, --model=none leaves it out.

The result holds one step, is read by training (give the folder above
`checkpoints` as --workdir) and serving like any other, and keeps the place in
the data. Nothing is ever overwritten. All of the result must fit on the
devices of --mesh at once, on a CPU in memory; of the source there is one shard
in memory at a time.
"""

import sys

from absl import app
from absl import flags
from absl import logging
import jax

from experiments import checkpoint_conversion
from experiments import configs
from experiments import training
from jaxtrain import distributed
from jaxtrain.sharding import simulate_devices

_SOURCE = flags.DEFINE_string(
  'source', None, 'Folder of checkpoints of a run.', required=True
)
_TARGET = flags.DEFINE_string(
  'target', None, 'Folder that is not there or empty; unless --dry_run.'
)
_RULES = flags.DEFINE_string(
  'rules', '[]', 'JSON, or the path of a .json file or of a .py with RULES.'
)
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Print the plan, read nothing.')
_STEP = flags.DEFINE_integer('step', None, 'Which; the latest by default.')
_DTYPE = flags.DEFINE_string('dtype', None, 'Of parameters, else as they are.')
_PARAMS_ONLY = flags.DEFINE_bool('params_only', False, 'Leave all else out.')
_CONFIG = flags.DEFINE_string(
  'config', None, 'Whose state to make, as for experiments.train_lm.'
)
_OVERRIDE = flags.DEFINE_multi_string(
  'override', [], 'key=json, changes the config: optimizer.name=lamb.'
)
_MODEL = flags.DEFINE_multi_string(
  'model', [], 'field=json, changes the stored architecture; none: without.'
)
_MESH = flags.DEFINE_string('mesh', '', "Where it happens: 'fsdp=8'.")
_SHARDING = flags.DEFINE_string('sharding', 'default', 'Preset of rules.')
_SIMULATE = flags.DEFINE_integer(
  'simulate_devices', None, 'Number of CPU devices to simulate.'
)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step it takes.
  try:
    if (_TARGET.value is None) != _DRY_RUN.value:
      raise ValueError('give either --target or --dry_run')
    if _SIMULATE.value:
      simulate_devices(_SIMULATE.value)
    distributed.initialize()
    config = None
    if _CONFIG.value is not None:
      config = configs.load(_CONFIG.value, _OVERRIDE.value)
      configs.check(config, training.run, training.OPTIONS)
    plan = checkpoint_conversion.run(
      _SOURCE.value,
      _TARGET.value,
      checkpoint_conversion.read_rules(_RULES.value),
      step=_STEP.value,
      dtype=_DTYPE.value,
      params_only=_PARAMS_ONLY.value,
      config=config,
      model=_MODEL.value,
      mesh=_MESH.value,
      sharding=_SHARDING.value,
    )
  except (ValueError, OSError) as e:
    sys.exit(f'convert_checkpoint: {e}')
  if jax.process_index() == 0:
    print(plan.table() if _DRY_RUN.value else plan.table().partition('\n')[0])


if __name__ == '__main__':
  app.run(main)
