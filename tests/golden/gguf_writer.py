"""Writes a golden checkpoint as GGUF, the way llama.cpp converts it.

The steps are those of llama.cpp's convert_hf_to_gguf.py: the `gguf` library's
names, one added to Gemma's norms, Llama's query and key rows put in pairs,
experts stacked, Llama 3's rope scaling as a tensor of factors.
"""

import json
import math
import os
import pathlib
import re

import gguf
import numpy as np
import safetensors.numpy

_ARCHITECTURES = {
  'llama': 'llama',
  'mistral': 'llama',
  'mixtral': 'llama',
  'qwen2': 'qwen2',
  'qwen3': 'qwen3',
  'qwen3_moe': 'qwen3moe',
  'gemma2': 'gemma2',
  'gemma3_text': 'gemma3',
}


def write_gguf(
  directory: str | os.PathLike,
  path: str | os.PathLike,
  kind: str = 'F32',
  rope_factors: np.ndarray | None = None,
  metadata: dict[str, float] | None = None,
) -> None:
  """Converts a Hugging Face directory.

  Args:
    directory: config.json and safetensors in float32.
    path: The new file.
    kind: Type of the matrices whose rows its blocks divide, such as 'Q8_0'.
    rope_factors: The tensor rope_freqs.weight.
    metadata: Further keys of the architecture.
  """
  directory = pathlib.Path(directory)
  config = json.loads((directory / 'config.json').read_text())
  arch = _ARCHITECTURES[config['model_type']]
  writer = gguf.GGUFWriter(str(path), arch)
  _write_metadata(writer, config, metadata or {})
  tensors = {}
  for file in sorted(directory.glob('*.safetensors')):
    tensors.update(safetensors.numpy.load_file(file))
  converted = _convert(tensors, config, arch)
  if rope_factors is not None:
    converted['rope_freqs.weight'] = rope_factors.astype(np.float32)
  quant = gguf.GGMLQuantizationType[kind]
  block, _ = gguf.GGML_QUANT_SIZES[quant]
  for name, x in converted.items():
    if x.ndim > 1 and x.shape[-1] % block == 0:
      data = gguf.quants.quantize(x, quant)
      writer.add_tensor(name, data, raw_dtype=quant)
    else:
      writer.add_tensor(name, x)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def _head_dim(config):
  width = config['hidden_size'] // config['num_attention_heads']
  return config.get('head_dim') or width


def _write_metadata(writer, config, metadata):
  head_dim = _head_dim(config)
  writer.add_context_length(config['max_position_embeddings'])
  writer.add_embedding_length(config['hidden_size'])
  writer.add_block_count(config['num_hidden_layers'])
  writer.add_feed_forward_length(config['intermediate_size'])
  writer.add_head_count(config['num_attention_heads'])
  writer.add_head_count_kv(config['num_key_value_heads'])
  writer.add_key_length(head_dim)
  writer.add_value_length(head_dim)
  writer.add_rope_dimension_count(head_dim)
  writer.add_layer_norm_rms_eps(config['rms_norm_eps'])
  writer.add_vocab_size(config['vocab_size'])
  rope = config['rope_parameters']
  rope = rope.get('full_attention', rope)
  writer.add_rope_freq_base(rope['rope_theta'])
  if rope['rope_type'] in ('linear', 'yarn'):
    writer.add_rope_scaling_type(gguf.RopeScalingType(rope['rope_type']))
    writer.add_rope_scaling_factor(rope['factor'])
  if rope['rope_type'] == 'yarn':
    writer.add_rope_scaling_orig_ctx_len(
      rope['original_max_position_embeddings']
    )
  num_experts = config.get('num_local_experts') or config.get('num_experts')
  if num_experts:
    writer.add_expert_count(num_experts)
    writer.add_expert_used_count(config['num_experts_per_tok'])
  if 'moe_intermediate_size' in config:
    writer.add_expert_feed_forward_length(config['moe_intermediate_size'])
  if config['model_type'].startswith('gemma'):
    writer.add_sliding_window(config['sliding_window'])
  if config['model_type'] == 'gemma2':
    writer.add_attn_logit_softcapping(config['attn_logit_softcapping'])
    writer.add_final_logit_softcapping(config['final_logit_softcapping'])
  for key, value in metadata.items():
    add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
    add(f'{writer.arch}.{key}', value)


def _convert(tensors, config, arch):
  by_arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
  names = gguf.get_tensor_name_map(by_arch[arch], config['num_hidden_layers'])
  out, experts = {}, {}
  for name, x in tensors.items():
    stem, kind = name.rsplit('.', 1)
    if match := re.search(r'\.experts\.(\d+)\.', name):
      stem = stem.replace(match[0], '.experts.')
      key = f'{names.get_name(stem)}.{kind}'
      experts.setdefault(key, {})[int(match[1])] = x
      continue
    if arch.startswith('gemma') and stem.endswith('norm'):
      x = x + np.float32(1)
    if arch == 'llama' and stem.endswith(('q_proj', 'k_proj')):
      x = _to_pairs(x, _head_dim(config))
    out[f'{names.get_name(stem)}.{kind}'] = x
  for key, parts in experts.items():
    out[key] = np.stack([parts[i] for i in range(len(parts))])
  return out


def _to_pairs(x, head_dim):
  """Rows (i, i + H/2) of each head side by side."""
  heads = x.reshape(-1, 2, head_dim // 2, *x.shape[1:])
  return np.ascontiguousarray(heads.swapaxes(1, 2).reshape(x.shape))


def llama3_factors(
  theta: float, head_dim: int, factor: float, original: int = 8192
) -> np.ndarray:
  """The tensor of factors that frequencies are divided by `[head_dim / 2]`."""
  low, high, out = 1.0, 4.0, []
  for i in range(0, head_dim, 2):
    wavelength = 2 * math.pi * theta ** (i / head_dim)
    if wavelength < original / high:
      out.append(1.0)
    elif wavelength > original / low:
      out.append(factor)
    else:
      smooth = (original / wavelength - low) / (high - low)
      out.append(1 / ((1 - smooth) / factor + smooth))
  return np.array(out, np.float32)
