"""Models of the serving benchmark, written where every engine reads them.

Weights are random and rounded to float16, then stored as float32: engines that
hold either have the same values.
"""

import dataclasses
import pathlib

from flax import linen as nn
import gguf
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors_numpy

from jaxtrain.checkpoints.gguf_import import find_gemma3_270m
from jaxtrain.checkpoints.gguf_import import load_gguf
from jaxtrain.checkpoints.huggingface import save_huggingface
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.config import Rope
from jaxtrain.models.transformer import Transformer

# 27 M parameters, as in the figures of vLLM and others that we compare with.
QWEN3_27M = ModelConfig(
  family='qwen3',
  vocab_size=4096,
  embed_dim=512,
  num_layers=8,
  num_heads=8,
  num_kv_heads=4,
  head_dim=64,
  mlp_dim=1536,
  max_seq_len=16384,
  rope=Rope(theta=1e6),
  qk_norm=True,
  tie_embeddings=True,
)

# Steps of a few milliseconds, so that schedulers meet thousands of them.
QWEN3_TINY = dataclasses.replace(
  QWEN3_27M,
  vocab_size=512,
  embed_dim=128,
  num_layers=4,
  num_heads=4,
  num_kv_heads=2,
  head_dim=32,
  mlp_dim=384,
)

_GGUF_NAMES = {
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output',
  'self_attn.q_norm': 'attn_q_norm',
  'self_attn.k_norm': 'attn_k_norm',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
  'input_layernorm': 'attn_norm',
  'post_attention_layernorm': 'ffn_norm',
}


@dataclasses.dataclass(frozen=True)
class Model:
  """Where a model lies: a Hugging Face directory and, perhaps, a GGUF file."""

  directory: str
  gguf: str | None
  vocab_size: int


def write_random(config: ModelConfig, directory: pathlib.Path) -> Model:
  """Writes a random model of the Qwen3 family."""
  model = Transformer(config)
  tokens = jnp.zeros((1, 2), int)

  def init(key):
    params = nn.unbox(model.init(key, tokens))['params']
    return jax.tree.map(
      lambda x: x.astype(jnp.float16).astype(jnp.float32), params
    )

  save_huggingface(directory, config, jax.jit(init)(jax.random.key(0)))
  path = directory / 'model.f16.gguf'
  _write_gguf(config, directory, path)
  return Model(str(directory), str(path), config.vocab_size)


def write_gemma(directory: pathlib.Path) -> Model:
  """Writes Gemma 3 270M, of the extra `onemesh[gemma]`, in float32.

  Raises:
    ValueError: The extra is not installed.
  """
  config, params = load_gguf(find_gemma3_270m())
  save_huggingface(directory, config, params)
  return Model(str(directory), None, config.vocab_size)


def _write_gguf(config, directory, path):
  """The same weights as GGUF; OpenVINO wants float16 and a BPE tokenizer."""
  w = gguf.GGUFWriter(str(path), 'qwen3')
  w.add_context_length(config.max_seq_len)
  w.add_embedding_length(config.embed_dim)
  w.add_block_count(config.num_layers)
  w.add_feed_forward_length(config.mlp_dim)
  w.add_head_count(config.num_heads)
  w.add_head_count_kv(config.num_kv_heads)
  w.add_key_length(config.head_dim)
  w.add_value_length(config.head_dim)
  w.add_rope_freq_base(config.rope.theta)
  w.add_layer_norm_rms_eps(config.norm_eps)
  w.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
  w.add_tokenizer_model('gpt2')
  w.add_tokenizer_pre('qwen2')
  w.add_token_list([f't{i}' for i in range(config.vocab_size)])
  # Without a control token its tokenizer cannot be built, and nothing runs.
  special = [gguf.TokenType.CONTROL] * 2
  normal = [gguf.TokenType.NORMAL] * (config.vocab_size - len(special))
  w.add_token_types(special + normal)
  w.add_token_merges(['t 1', 't 2'])
  w.add_bos_token_id(0)
  w.add_eos_token_id(1)
  tensors = safetensors_numpy.load_file(directory / 'model.safetensors')
  for name, x in tensors.items():
    dtype = np.float16 if x.ndim == 2 else np.float32
    w.add_tensor(_gguf_name(name), x.astype(dtype))
  w.write_header_to_file()
  w.write_kv_data_to_file()
  w.write_tensors_to_file()
  w.close()


def _gguf_name(name):
  if name == 'model.embed_tokens.weight':
    return 'token_embd.weight'
  if name == 'model.norm.weight':
    return 'output_norm.weight'
  _, _, layer, *rest = name.split('.')
  return f'blk.{layer}.{_GGUF_NAMES[".".join(rest[:-1])]}.weight'
