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

from collections.abc import Mapping, Sequence
import json
import pathlib
import runpy
import sys
from typing import Any

from absl import app
from absl import flags
from absl import logging
import jax
import tqdm

from experiments import choices
from experiments import configs
from experiments import training
from jaxtrain import distributed
from jaxtrain import train_state
from jaxtrain.checkpoints import convert
from jaxtrain.checkpoints import remap
from jaxtrain.checkpoints import remap_language
from jaxtrain.checkpoints import stored
from jaxtrain.models import config_json
from jaxtrain.sharding import make_mesh
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


def read_rules(text: str) -> list[dict[str, Any]]:
  """Rules from JSON, or from a file that has them.

  Raises:
    ValueError: It is neither.
  """
  path = pathlib.Path(text)
  if path.suffix in ('.json', '.py') and not path.is_file():
    raise ValueError(f'no rules at {path}')
  if path.suffix == '.py':
    values = runpy.run_path(str(path))
    if 'RULES' not in values:
      raise ValueError(f'{path} has no RULES')
    return values['RULES']
  text = path.read_text() if path.suffix == '.json' else text
  try:
    return json.loads(text)
  except json.JSONDecodeError as e:
    raise ValueError(f'rules are not JSON: {e}') from e


def run(
  source: str,
  target: str | None,
  rules: Sequence[Mapping[str, Any]] = (),
  *,
  step: int | None = None,
  dtype: str | None = None,
  params_only: bool = False,
  config: Mapping[str, Any] | None = None,
  model: Sequence[str] = (),
  mesh: str = '',
  sharding: str = 'default',
) -> remap.Plan:
  """Converts one checkpoint; see the flags.

  Args:
    source: Folder of checkpoints.
    target: Folder to write; `None` only plans.
    rules: See `remap_rules`.
    step: Which; `None` is the latest.
    dtype: Of parameters.
    params_only: Whether all else is left out.
    config: As `experiments.training.run` takes it: whose state to make.
    model: 'field=json' each, or ('none',).
    mesh: Where it happens.
    sharding: Preset.

  Returns:
    The plan.

  Raises:
    ValueError: As `remap.plan`, or the target is there already.
  """
  if target is not None:
    convert.check_empty(target)
  rules = list(rules)
  if params_only:
    rules += remap_language.PARAMS_ONLY
  if dtype is not None:
    choices.float_dtype('dtype', dtype)
    rules.append({'rule': 'cast', 'from': '.*', 'dtype': dtype})
  mesh, sharding = make_mesh(mesh), choices.sharding_rules(sharding)
  with stored.open_checkpoint(source, step) as checkpoint:
    if config is None:
      architecture, wanted, fresh = _architecture(checkpoint, model), None, None
    else:
      architecture, wanted, fresh = _new_run(config, mesh, sharding)
      if params_only:
        wanted = {'params': wanted['params']}
    plan = remap.plan(checkpoint.leaves, rules, wanted, checkpoint.where)
    if wanted is None:
      wanted = convert.target_of(checkpoint, plan, mesh, sharding, architecture)
    if target is None:
      return plan
    new = None
    if any(row.view is None for row in plan.rows):
      new = fresh()
    with _progress(plan) as progress:
      convert.write(
        checkpoint,
        plan,
        wanted,
        target,
        architecture,
        data_state=None if params_only else checkpoint.read_data_state(),
        new=new,
        on_read=progress.update,
      )
  return plan


def _architecture(checkpoint, changes):
  """The architecture of the result; `None` if it is to have none."""
  if list(changes) == ['none'] or (checkpoint.config is None and not changes):
    return None
  if checkpoint.config is None:
    raise ValueError(f'{checkpoint.where} has no model config to change')
  values = config_json.to_json(checkpoint.config)
  for change in changes:
    field, equals, value = change.partition('=')
    if not equals or field not in values:
      raise ValueError(
        f'--model={change!r} is not field=json; fields: {", ".join(values)}'
      )
    values[field] = json.loads(value)
  return config_json.from_json(values)


def _new_run(config, mesh, sharding):
  """Architecture, state and a function to its values of a run's beginning."""
  model, tx = training.model_and_optimizer(**config)
  spec = train_state.state_spec(model, tx, mesh, sharding)

  def fresh():
    seed = config.get('seed', 0)
    state = train_state.init_state(model, tx, mesh, sharding, seed=seed)
    return vars(state)

  return config['model'], vars(spec.abstract), fresh


def _progress(plan):
  shown = jax.process_index() == 0 and sys.stderr.isatty()
  # What other processes read is not known here.
  total = sum(row.num_bytes for row in plan.rows if row.view is not None)
  total = total if jax.process_count() == 1 else None
  return tqdm.tqdm(
    desc='Converting',
    total=total,
    unit='B',
    unit_scale=True,
    disable=not shown,
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
    plan = run(
      _SOURCE.value,
      _TARGET.value,
      read_rules(_RULES.value),
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
