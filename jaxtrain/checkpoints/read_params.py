"""Reads a training checkpoint without its optimizer, as serving does."""

import os
from typing import Any

from jax.sharding import Mesh

from jaxtrain.checkpoints import abstract
from jaxtrain.checkpoints import orbax_io
from jaxtrain.models import config_json
from jaxtrain.models.config import ModelConfig
from jaxtrain.sharding import ShardingRules


def read_config(
  directory: str | os.PathLike, step: int | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
  """Architecture and metadata of a checkpoint, without its arrays.

  Raises:
    ValueError: As `restore_params`.
  """
  with orbax_io.open_folder(directory, create=False) as manager:
    step = orbax_io.pick(manager, step)
    orbax_io.check_files(manager, step, verify=False)
    return _read_config(manager, step)


def restore_params(
  directory: str | os.PathLike,
  mesh: Mesh | None,
  rules: ShardingRules,
  step: int | None = None,
  param_dtype: Any = None,
  verify: bool = True,
) -> tuple[ModelConfig, Any]:
  """Reads the parameters of a training checkpoint, and nothing else of it.

  Args:
    directory: What `CheckpointManager` was given.
    mesh: Devices; `None` is the first local device.
    rules: Which axis goes where.
    step: Which; `None` is the latest.
    param_dtype: Dtype of the parameters; `None` keeps the stored ones.
    verify: Whether to compare checksums of the parameters first.

  Returns:
    The architecture and the parameter tree of `Transformer(config)`.

  Raises:
    ValueError: No checkpoint there, one saved without a config, an unfinished
      or damaged one, or a dimension that the mesh does not divide.
  """
  with orbax_io.open_folder(directory, create=False) as manager:
    step = orbax_io.pick(manager, step)
    orbax_io.check_files(
      manager, step, verify, arrays=lambda name: name.startswith('params/')
    )
    config, _ = _read_config(manager, step)
    wanted = {'params': abstract.sharded_params(config, mesh, rules)}
    if param_dtype is None:
      stored = orbax_io.stored_leaves(manager, step)
      wanted = abstract.with_stored_dtypes(wanted, stored)
    else:
      wanted = abstract.with_dtype(wanted, param_dtype)
    state = orbax_io.read_state(manager, step, wanted, partial=True)
  return config, state['params']


def _read_config(manager, step):
  meta = orbax_io.read_meta(manager, step)
  if meta['config'] is None:
    raise ValueError(
      f'checkpoint step {step} in {manager.directory} was saved without a '
      'model config'
    )
  return config_json.from_json(meta['config']), meta['metadata']
