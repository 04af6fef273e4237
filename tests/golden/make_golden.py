"""Writes the tiny checkpoints and logits that our models are compared with.

Needs `transformers` (5) and torch, which the tests do not:

  python tests/golden/make_golden.py           # writes tests/golden/<case>/
  python tests/golden/make_golden.py --check   # transformers loads our exports

Each case is a random model written by `save_pretrained` in float32, and the
logits of its eager attention on `TOKENS`. Weights are wide enough for logits of
order one, norms and biases are random too, windows, rope scalings and soft caps
bite within the 48 tokens: whatever is read wrongly changes the logits.
"""

import argparse
import pathlib
import shutil
import tempfile

import numpy as np
import torch
import transformers

_HERE = pathlib.Path(__file__).parent
_VOCAB, _WIDTH, _LENGTH = 96, 32, 48
_SIZES = dict(
  vocab_size=_VOCAB,
  hidden_size=_WIDTH,
  intermediate_size=40,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=256,
  rms_norm_eps=1e-3,
  bos_token_id=None,
  eos_token_id=None,
  pad_token_id=None,
  attn_implementation='eager',
)
_LONG = dict(rope_theta=10_000.0, original_max_position_embeddings=16)

CASES = {
  'llama2': (
    'Llama',
    dict(
      num_key_value_heads=4,
      rms_norm_eps=1e-2,
      rope_parameters=dict(rope_type='linear', factor=4.0, rope_theta=10_000.0),
    ),
  ),
  'llama3': (
    'Llama',
    dict(
      head_dim=16,
      tie_word_embeddings=True,
      rope_parameters=dict(
        rope_type='llama3',
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        **(_LONG | dict(rope_theta=100.0)),
      ),
    ),
  ),
  'mistral': (
    'Mistral',
    dict(
      sliding_window=7,
      head_dim=16,
      rope_parameters=dict(rope_type='default', rope_theta=1_000.0),
    ),
  ),
  'qwen2': (
    'Qwen2',
    dict(
      num_hidden_layers=4,
      use_sliding_window=True,
      sliding_window=9,
      max_window_layers=2,
      rope_parameters=dict(rope_type='yarn', factor=4.0, **_LONG),
    ),
  ),
  'qwen3': (
    'Qwen3',
    dict(
      head_dim=16,
      tie_word_embeddings=True,
      rope_parameters=dict(rope_type='default', rope_theta=1_000_000.0),
    ),
  ),
  'qwen3_moe': (
    'Qwen3Moe',
    dict(
      head_dim=16,
      num_experts=6,
      num_experts_per_tok=2,
      moe_intermediate_size=16,
      norm_topk_prob=False,
      rope_parameters=dict(rope_type='default', rope_theta=10_000.0),
    ),
  ),
  'mixtral': (
    'Mixtral',
    dict(
      head_dim=8,
      intermediate_size=16,
      num_local_experts=4,
      num_experts_per_tok=2,
      sliding_window=11,
      rope_parameters=dict(rope_type='default', rope_theta=1_000_000.0),
    ),
  ),
  'gemma2': (
    'Gemma2',
    dict(
      num_hidden_layers=2,
      head_dim=16,
      query_pre_attn_scalar=24,
      sliding_window=7,
      attn_logit_softcapping=2.0,
      final_logit_softcapping=3.0,
      rope_parameters=dict(rope_type='default', rope_theta=10_000.0),
    ),
  ),
  'gemma3': (
    'Gemma3Text',
    dict(
      num_hidden_layers=7,
      head_dim=8,
      intermediate_size=24,
      query_pre_attn_scalar=12,
      sliding_window=7,
      rope_parameters=dict(
        full_attention=dict(rope_type='linear', factor=4.0, rope_theta=1_000.0),
        sliding_attention=dict(rope_type='default', rope_theta=10.0),
      ),
    ),
  ),
}
# Written in several files with an index.
_SHARDED = 'qwen3'
_MAX_BYTES = 300_000


def tokens() -> np.ndarray:
  """The fixed batch `[2, 48]`."""
  rng = np.random.default_rng(0)
  return rng.integers(0, _VOCAB, (2, _LENGTH)).astype(np.int32)


def build(case: str) -> torch.nn.Module:
  """A random model."""
  name, changes = CASES[case]
  config = getattr(transformers, f'{name}Config')(**(_SIZES | changes))
  name = name.removesuffix('Text')
  model = getattr(transformers, f'{name}ForCausalLM')(config).eval()
  generator = torch.Generator().manual_seed(sorted(CASES).index(case))
  with torch.no_grad():
    for key, p in model.named_parameters():
      if p.ndim == 1:
        is_bias = key.endswith('bias')
        p.normal_(0.0, 0.5 if is_bias else 0.3, generator=generator)
        if not is_bias and not case.startswith('gemma'):
          p.add_(1.0)
      else:
        fan_in = p.shape[-1]
        width = 1.5 * fan_in**-0.5
        p.normal_(0.0, 0.7 if 'embed' in key else width, generator=generator)
  return model


def logits(model: torch.nn.Module) -> np.ndarray:
  """Logits `[2, 48, V]` of the fixed batch."""
  with torch.no_grad():
    return model(torch.from_numpy(tokens()).long()).logits.numpy()


def write(case: str) -> None:
  """Writes one case."""
  directory = _HERE / case
  shutil.rmtree(directory, ignore_errors=True)
  model = build(case)
  size = 60_000 if case == _SHARDED else 10**9
  model.save_pretrained(directory, max_shard_size=size)
  (directory / 'generation_config.json').unlink(missing_ok=True)
  out = logits(model)
  np.savez_compressed(directory / 'logits.npz', tokens=tokens(), logits=out)
  total = sum(f.stat().st_size for f in directory.iterdir())
  assert total < _MAX_BYTES, (case, total)
  print(f'{case:10} {total:7} bytes, logits rms {np.sqrt((out**2).mean()):.3f}')


def check(case: str) -> None:
  """Loads a case, exports it, and has transformers load the export."""
  from jaxtrain.checkpoints import huggingface

  config, params = huggingface.load_huggingface(_HERE / case)
  with tempfile.TemporaryDirectory() as scratch:
    path = pathlib.Path(scratch) / 'export'
    huggingface.save_huggingface(path, config, params, max_shard_bytes=50_000)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
      path, attn_implementation='eager', output_loading_info=True
    )
  assert not any(info.values()), info
  assert model.dtype == torch.float32
  difference = np.abs(logits(model.eval()) - logits(build(case))).max()
  print(f'{case:10} transformers loads our export, difference {difference:.1e}')
  assert difference == 0, difference


def main() -> None:
  """Writes or checks all cases."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--check', action='store_true')
  parser.add_argument('cases', nargs='*', default=list(CASES))
  args = parser.parse_args()
  for case in args.cases:
    (check if args.check else write)(case)


if __name__ == '__main__':
  main()
