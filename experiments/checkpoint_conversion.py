"""Makes one checkpoint of another; `convert_checkpoint` is the binary."""

from collections.abc import Mapping, Sequence
import json
import pathlib
import runpy
import sys
from typing import Any

import jax
import tqdm

from experiments import choices
from experiments import training
from jaxtrain import train_state
from jaxtrain.checkpoints import convert
from jaxtrain.checkpoints import remap
from jaxtrain.checkpoints import remap_language
from jaxtrain.checkpoints import stored
from jaxtrain.models import config_json
from jaxtrain.sharding import make_mesh


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
