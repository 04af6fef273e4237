"""The architecture that a GGUF file's metadata describe.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what they leave
out is as llama.cpp has it built in.
"""

import dataclasses

import numpy as np

from jaxtrain.checkpoints.gguf_file import GGUFFile
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.config import MoE
from jaxtrain.models.config import Rope
from jaxtrain.models.rope import inverse_frequencies

# general.architecture -> our family; 'llama' with experts is Mixtral.
_FAMILIES = {
  'gemma2': 'gemma2',
  'gemma3': 'gemma3',
  'llama': 'llama',
  'qwen2': 'qwen2',
  'qwen3': 'qwen3',
  'qwen3moe': 'qwen3_moe',
}
ROPE_FACTORS = 'rope_freqs.weight'
# Metadata of an architecture that say nothing new about the model.
_HARMLESS = frozenset(
  'vocab_size tensor_data_layout rope.scaling.finetuned '
  'expert_shared_feed_forward_length rope.dimension_sections'.split()
)


def gguf_config(file: GGUFFile) -> ModelConfig:
  """The architecture that a file's metadata describe.

  Raises:
    ValueError: An unsupported architecture or switch, or a missing key.
  """
  try:
    return _read(file)
  except ValueError as e:
    message = str(e)
    if file.where not in message:
      message = f'{file.where}: {message}'
    raise ValueError(message) from e
  except (ArithmeticError, TypeError) as e:
    raise ValueError(f'{file.where}: metadata make no sense: {e}') from e


def _read(file):
  arch = file.get('general.architecture')
  if arch not in _FAMILIES:
    raise ValueError(
      f'{file.where}: architecture {arch!r} is not supported; allowed: '
      f'{", ".join(_FAMILIES)}'
    )
  if (count := file.get('split.count', 1)) > 1:
    raise ValueError(
      f'{file.where} is one of {count} files; join them with llama-gguf-split '
      '--merge'
    )
  keys = _Keys(file, arch)
  num_heads, embed_dim = keys('attention.head_count'), keys('embedding_length')
  head_dim = keys('attention.key_length', embed_dim // num_heads)
  for key in ('attention.value_length', 'rope.dimension_count'):
    keys.only(key, head_dim)
  keys.only('attention.layer_norm_epsilon', None)
  num_layers = keys('block_count')
  config = ModelConfig(
    family=_FAMILIES[arch],
    vocab_size=file.shapes.get('token_embd.weight', (0,))[0],
    embed_dim=embed_dim,
    num_layers=num_layers,
    num_heads=num_heads,
    num_kv_heads=keys('attention.head_count_kv', num_heads),
    head_dim=head_dim,
    mlp_dim=keys('feed_forward_length'),
    max_seq_len=keys('context_length'),
    rope=_rope(keys, file, head_dim),
    # The shortest decimal that rounds to the float32 stored.
    norm_eps=float(str(np.float32(keys('attention.layer_norm_rms_epsilon')))),
    tie_embeddings='output.weight' not in file.shapes,
    qkv_bias=arch == 'qwen2',
    qk_norm=arch in ('qwen3', 'qwen3moe', 'gemma3'),
  )
  if arch.startswith('gemma'):
    config = _gemma(config, arch, keys)
  config = _experts(config, arch, keys)
  keys.finish()
  return config


class _Keys:
  """Reads the metadata of one architecture; every key has to be understood."""

  def __init__(self, file, arch):
    self._file, self._prefix = file, f'{arch}.'
    self._unread = {
      k.removeprefix(self._prefix)
      for k in file.fields
      if k.startswith(self._prefix)
    } - _HARMLESS

  def __call__(self, key, *default):
    self._unread.discard(key)
    value = self._file.get(self._prefix + key, *default)
    if value is None and not default:
      raise ValueError(
        f'{self._file.where}: metadata {self._prefix}{key} is missing'
      )
    if isinstance(value, np.ndarray):  # One value per layer.
      if len(set(value.tolist())) != 1:
        raise ValueError(
          f'{self._file.where}: {self._prefix}{key} differs between layers, '
          'which is not supported'
        )
      value = value[0].item()
    return value

  def only(self, key, allowed):
    if (value := self(key, allowed)) != allowed:
      raise ValueError(
        f'{self._file.where}: {self._prefix}{key}={value!r} is not supported; '
        f'allowed: {allowed!r}'
      )

  def finish(self):
    if self._unread:
      raise ValueError(
        f'{self._file.where}: metadata not supported: '
        f'{", ".join(self._prefix + k for k in sorted(self._unread))}'
      )


def _rope(keys, file, head_dim):
  theta = keys('rope.freq_base', 10_000.0)
  if not 0 < theta < float('inf'):
    raise ValueError(f'{file.where}: rope.freq_base={theta} is not a base')
  kind = keys('rope.scaling.type', 'none')
  factor = keys('rope.scaling.factor', 1.0)
  original = keys('rope.scaling.original_context_length', None)
  # Before there were types.
  legacy = keys('rope.scale_linear', 1.0)
  if legacy != 1.0:
    kind, factor = 'linear', legacy
  keys.only('rope.scaling.attn_factor', 1.0)
  if kind not in ('none', 'linear', 'yarn'):
    raise ValueError(
      f'{file.where}: rope scaling {kind!r} is not supported; allowed: none, '
      'linear, yarn, or the factors of Llama 3'
    )
  if ROPE_FACTORS in file.shapes:
    factors = file.read(ROPE_FACTORS, (slice(None),))
    return _llama3_rope(theta, factors, head_dim, file.where)
  if kind == 'yarn':
    original = original or keys('context_length')
    return Rope(theta, 'yarn', factor, original_max_len=original)
  return Rope(theta, kind, factor) if kind == 'linear' else Rope(theta)


def _llama3_rope(theta, factors, head_dim, where):
  """The scaling whose frequencies are the plain ones divided by `factors`."""
  # The published models differ in `factor` only, that of the longest waves.
  rope = Rope(theta, 'llama3', round(float(factors.max()), 4))
  plain = inverse_frequencies(Rope(theta), head_dim)
  want = plain / inverse_frequencies(rope, head_dim)
  if factors.shape != want.shape or not np.allclose(factors, want, rtol=1e-3):
    raise ValueError(
      f'{where}: {ROPE_FACTORS} is not the scaling of Llama 3.1 (original '
      f'context 8192, low 1, high 4): {factors}'
    )
  return rope


def _gemma(config, arch, keys):
  is_gemma2 = arch == 'gemma2'
  period = keys('attention.sliding_window_pattern', 2 if is_gemma2 else 6)
  local = keys('rope.freq_base_swa', 10_000.0)
  # llama.cpp knows by the number of layers which models scale queries by
  # D / N and not by H: the two of 27B.
  is_27b = config.num_layers == (46 if is_gemma2 else 62)
  scale = (config.embed_dim / config.num_heads) ** -0.5 if is_27b else None
  return dataclasses.replace(
    config,
    sliding_rope=None if is_gemma2 else Rope(local),
    sliding_window=keys('attention.sliding_window', 4096),
    layer_pattern=('sliding',) * (period - 1) + ('full',),
    activation='gelu',
    post_norms=True,
    norm_plus_one=True,
    embed_scale=True,
    query_scale=scale,
    attention_soft_cap=keys(
      'attn_logit_softcapping', 50.0 if is_gemma2 else None
    ),
    logit_soft_cap=keys('final_logit_softcapping', 30.0 if is_gemma2 else None),
  )


def _experts(config, arch, keys):
  num_experts = keys('expert_count', 0)
  used = keys('expert_used_count', 0)
  mlp_dim = keys('expert_feed_forward_length', config.mlp_dim)
  if not num_experts:
    return config
  if arch not in ('llama', 'qwen3moe'):
    raise ValueError(f'{arch} with expert_count={num_experts} is not supported')
  return dataclasses.replace(
    config,
    family='mixtral' if arch == 'llama' else config.family,
    moe=MoE(num_experts, used, mlp_dim),
  )
