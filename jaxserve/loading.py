"""Finds out what a model path is, and loads it onto a mesh."""

from collections.abc import Mapping
import functools
import os
import pathlib
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from jaxtrain.checkpoints import huggingface
from jaxtrain.checkpoints import manager
from jaxtrain.checkpoints.gguf_config import gguf_config
from jaxtrain.checkpoints.gguf_file import open_gguf
from jaxtrain.checkpoints.gguf_import import load_gguf
from jaxtrain.checkpoints.gguf_tokenizer import gguf_special_tokens
from jaxtrain.checkpoints.gguf_tokenizer import gguf_tokenizer
from jaxtrain.checkpoints.tokenizer import HFTokenizer
from jaxtrain.checkpoints.tokenizer import Tokenizer
from jaxtrain.checkpoints.tokenizer import load_tokenizer
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import ShardingRules
from jaxtrain.sharding import param_shardings
from jaxtrain.sharding.partition import fit_rules
from jaxtrain.sharding.partition import path_name


def load_model(
  model: str | os.PathLike | Any,
  config: ModelConfig | None,
  mesh: jax.sharding.Mesh,
  rules: ShardingRules,
  param_dtype: Any = None,
) -> tuple[ModelConfig, Any, ShardingRules, Tokenizer | None]:
  """Loads or places a model. See `jaxserve.LLM` for the arguments.

  Returns:
    The architecture; the parameters on the mesh; the rules that placed them,
    with logical axes that do not divide replicated; and the tokenizer found
    beside the model, if any.

  Raises:
    ValueError: No model there, or one that cannot be read.
  """
  if isinstance(model, Mapping):
    if config is None:
      raise ValueError('a parameter tree needs LLM(config=ModelConfig(...))')
    rules = fitted_rules(config, mesh, rules)
    params = place(model, config, mesh, rules, param_dtype)
    return config, params, rules, None
  if config is not None:
    raise ValueError(f'{model} has a config of its own; do not give one')
  path = pathlib.Path(model)
  if path.is_file() and path.suffix == '.gguf':
    return _load_gguf(path, mesh, rules, param_dtype)
  if (path / 'config.json').is_file():
    config = huggingface.read_config(path)
    rules = fitted_rules(config, mesh, rules)
    _, params = huggingface.load_huggingface(path, mesh, rules, param_dtype)
    found = (path / 'tokenizer.json').is_file()
    return config, params, rules, load_tokenizer(path) if found else None
  if path.is_dir():
    config, metadata = manager.read_config(path)
    rules = fitted_rules(config, mesh, rules)
    _, params = manager.restore_params(
      path, mesh, rules, param_dtype=param_dtype
    )
    spec = metadata.get('tokenizer')
    return config, params, rules, load_tokenizer(spec) if spec else None
  raise ValueError(
    f'no model at {str(model)!r}: give a directory with config.json and '
    'safetensors, a .gguf file, or a training checkpoint directory'
  )


def _load_gguf(path, mesh, rules, param_dtype):
  file = open_gguf(path)
  config = gguf_config(file)
  rules = fitted_rules(config, mesh, rules)
  dtype = jnp.float32 if param_dtype is None else param_dtype
  _, params = load_gguf(path, mesh, rules, dtype)
  tokenizer = None
  if file.get('tokenizer.ggml.model') is not None:
    tokenizer = HFTokenizer(gguf_tokenizer(path), **gguf_special_tokens(path))
  return config, params, rules, tokenizer


def fitted_rules(
  config: ModelConfig, mesh: jax.sharding.Mesh, rules: ShardingRules
) -> ShardingRules:
  """`rules` without the logical axes that do not divide on this mesh."""
  return fit_rules(_boxed(config), mesh, rules)


@functools.lru_cache(maxsize=4)
def _boxed(config):
  tokens = jnp.zeros((1, 1), jnp.int32)
  init = lambda: Transformer(config).init(jax.random.key(0), tokens)
  return jax.eval_shape(init)['params']


def place(
  params: Any,
  config: ModelConfig,
  mesh: jax.sharding.Mesh,
  rules: ShardingRules,
  param_dtype: Any = None,
) -> Any:
  """Puts a parameter tree on a mesh; leaves already there are not copied.

  Raises:
    ValueError: A tree of another architecture, or a dimension that its mesh
      axes do not divide.
  """
  boxed = _boxed(config)
  shardings = param_shardings(boxed, mesh, rules)
  wanted = jax.tree.structure(shardings)
  if jax.tree.structure(params) != wanted:
    raise ValueError(
      f'the parameter tree does not fit its config: got '
      f'{jax.tree.structure(params)}, wanted {wanted}'
    )
  for path, (wanted_leaf, leaf) in _leaves(nn.unbox(boxed), params):
    if wanted_leaf.shape != leaf.shape:
      raise ValueError(
        f'parameter {path}: got shape {leaf.shape}, wanted {wanted_leaf.shape}'
      )
  if param_dtype is not None:
    params = jax.tree.map(lambda x: x.astype(param_dtype), params)
  return jax.device_put(params, shardings)


def _leaves(*trees):
  paths, _ = jax.tree_util.tree_flatten_with_path(trees[0])
  leaves = zip(*(jax.tree.leaves(t) for t in trees), strict=True)
  return zip((path_name(p) for p, _ in paths), leaves, strict=True)
