"""Hugging Face directories, in and out.

In: streamed to the shards (`params.py`). Out: `huggingface_export.py`.
"""

import os
import pathlib
from typing import Any

from jax.sharding import Mesh
import numpy as np

from jaxtrain.checkpoints import params as params_lib
from jaxtrain.checkpoints import safetensors_io
from jaxtrain.checkpoints.huggingface_export import save_huggingface
from jaxtrain.models import families
from jaxtrain.models.config import ModelConfig
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import ShardingRules

__all__ = ['load_huggingface', 'read_config', 'save_huggingface']


def read_config(path: str | os.PathLike) -> ModelConfig:
  """Reads the architecture of a Hugging Face directory.

  Raises:
    ValueError: No such directory, no config.json, an unknown family or an
      unsupported switch.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    raise ValueError(f'{path} is not a directory with a Hugging Face model')
  config_json = safetensors_io.read_json(path / 'config.json')
  try:
    return families.find(config_json).config_from_hf(config_json)
  except ValueError as e:
    raise ValueError(f'{path}: {e}') from e


def load_huggingface(
  path: str | os.PathLike,
  mesh: Mesh | None = None,
  rules: ShardingRules = PRESETS['default'],
  param_dtype: Any = None,
) -> tuple[ModelConfig, Any]:
  """Loads a model from a Hugging Face directory onto a mesh.

  Args:
    path: Directory with config.json and model.safetensors, or several files
      with model.safetensors.index.json.
    mesh: Devices; `None` is the first local device.
    rules: Which logical axis goes where.
    param_dtype: Dtype of the parameters; `None` keeps the stored one.

  Returns:
    The architecture, and the parameters of its `Transformer`, each born on its
    shards.

  Raises:
    ValueError: An unknown family, an unsupported switch, a missing or broken
      file, or a missing, extra or misshapen tensor; each is named.
  """
  path = pathlib.Path(path)
  config = read_config(path)
  family = families.get(config.family)
  source = safetensors_io.SafetensorsSource(path, family.tensor_name)
  _hide_derived(source, config)
  params = params_lib.load(
    config, family.weights(config), source, mesh, rules, param_dtype
  )
  return config, params


def _hide_derived(source, config):
  """Ignores what the file repeats: rotary tables and a tied output matrix."""
  for name in list(source.shapes):
    if name.endswith('rotary_emb.inv_freq'):
      source.hide(name)
  tied, head = 'model.embed_tokens.weight', 'lm_head.weight'
  if not config.tie_embeddings or not {tied, head} <= set(source.shapes):
    return
  rows, columns = shape = source.shapes[tied]
  same = source.shapes[head] == shape
  step = max(1, (64 << 20) // columns)
  for start in range(0, rows if same else 0, step):
    index = (slice(start, min(start + step, rows)), slice(None))
    same = np.array_equal(source.read(tied, index), source.read(head, index))
    if not same:
      break
  if not same:
    raise ValueError(
      f'{source.where}: config.json ties the embeddings, but {head} is not '
      f'{tied}; set tie_word_embeddings to false'
    )
  source.hide(head)
