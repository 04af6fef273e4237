"""Compares our logits and token ids from a GGUF file with `transformers`'.

  pip install transformers accelerate torch onemesh[gemma]
  python -m experiments.compare_gemma_gguf

Both sides dequantise the same file to float32 and run in float32 on the CPU, so
that they differ by the order of sums alone. The bound on the RMS error over the
RMS of the logits is the 1e-5 that the tests hold every float32 kernel to, and
the most likely token must be the same at every position where the reference's
two best logits are further apart than the largest error seen. One prompt is
longer than the sliding window of 512 tokens.
"""

import importlib.metadata
import importlib.util
import json
import pathlib
import re
import sys

from absl import app
from absl import flags
import jax
import numpy as np

from jaxtrain.checkpoints.gguf_import import find_gemma3_270m
from jaxtrain.checkpoints.gguf_import import gguf_tokenizer
from jaxtrain.checkpoints.gguf_import import load_gguf
from jaxtrain.models.transformer import Transformer

_GGUF = flags.DEFINE_string(
  'gguf', None, 'File to compare; by default the Gemma 3 270M of [gemma].'
)
_OUTPUT = flags.DEFINE_string(
  'output',
  str(pathlib.Path(__file__).parent / 'benchmarks/results/gemma_gguf.json'),
  'Where the result is written.',
)
_MAX_RMS = flags.DEFINE_float(
  'max_rms', 1e-5, 'Largest RMS error over RMS of the logits.'
)

PROMPTS = (
  'The capital of France is',
  'Once upon a time, in a small village by the sea,',
  'def fibonacci(n):\n    if n < 2:\n        return n\n    return',
  'Water boils at 100 degrees Celsius, and it freezes at',
  'Ελληνικά, русский, 中文, 日本語 und 한국어 in einem Satz:',
)
TEXTS = PROMPTS + (
  '',
  ' leading and trailing ',
  'two  spaces,   three,    four',
  'one\ntwo\n\nthree\n\n\n\ttab\t\ttabs\r\n',
  'naïve café — “quotes” … 100 €, e\u0301 and é, ½ ﬁ ²',
  '😀 👩‍👩‍👧‍👦 🏳️‍🌈 \u00a0\u200b\ufeff 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈',
  'العربية עברית हिन्दी ไทย',
  '<start_of_turn>user\nHello<end_of_turn>\n<table><tr></tr></table> <0x41>',
  'a' * 50 + " 3.14159 1,000,000 don't I'll",
)


def long_text() -> str:
  """Real text that is on every machine, longer than the window.

  Spaces are cut to runs of 31, the longest that are one token: longer ones
  `transformers`, which rebuilds merges for them, splits in equal parts, where
  SentencePiece, and we, take the longest token first.
  """
  source = pathlib.Path(importlib.util.find_spec('argparse').origin)
  text = source.read_text('utf-8')
  start = text.index('"""')
  return re.sub(' {32,}', ' ' * 31, text[start : start + 6000])


def compare_logits(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
  """Differences of two logits `[T, V]`."""
  theirs = theirs.astype(np.float64)
  error = ours - theirs
  top = np.sort(theirs, axis=-1)[:, -2:]
  margin = top[:, 1] - top[:, 0]
  same = ours.argmax(-1) == theirs.argmax(-1)
  worst = np.abs(error).max()
  return dict(
    num_tokens=len(ours),
    max_abs=float(worst),
    max_relative=float(worst / np.abs(theirs).max()),
    rms_relative=float(np.sqrt((error**2).mean() / (theirs**2).mean())),
    top1_agreement=float(same.mean()),
    top1_wrong_beyond_error=int((~same & (margin > 2 * worst)).sum()),
  )


def _load_theirs(path):
  """`transformers`' model and tokenizer of the file."""
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent,
    gguf_file=path.name,
    dtype=torch.float32,
    attn_implementation='eager',
  ).eval()

  def run(ids):
    with torch.no_grad():
      return model(torch.tensor([ids])).logits[0].numpy()

  tokenizer = transformers.AutoTokenizer.from_pretrained(
    path.parent, gguf_file=path.name
  )
  return run, lambda text: tokenizer.encode(text, add_special_tokens=False)


def _load_ours(path):
  """Our model and tokenizer of the file."""
  config, params = load_gguf(path)
  apply = jax.jit(lambda p, t: Transformer(config).apply({'params': p}, t)[0])
  tokenizer = gguf_tokenizer(path)

  def encode(text, add_special_tokens=False):
    return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

  return lambda ids: np.asarray(apply(params, np.array([ids]))[0]), encode


def main(argv):
  """Compares, prints, writes the result; exits 1 on disagreement."""
  del argv
  path = pathlib.Path(_GGUF.value or find_gemma3_270m())
  their_run, their_encode = _load_theirs(path)
  our_run, our_encode = _load_ours(path)
  results, is_ok = [], True
  for text in (*PROMPTS, long_text()):
    ids = our_encode(text, add_special_tokens=True)
    result = compare_logits(our_run(ids), their_run(ids))
    results.append(dict(prompt=text[:60], **result))
    is_ok &= result['rms_relative'] <= _MAX_RMS.value
    is_ok &= not result['top1_wrong_beyond_error']
    print(
      f'{result["num_tokens"]:5} tokens  max abs {result["max_abs"]:.1e}  '
      f'max rel {result["max_relative"]:.1e}  rms rel '
      f'{result["rms_relative"]:.1e}  top-1 {result["top1_agreement"]:.2%}  '
      f'{text[:40]!r}'
    )
  texts = (*TEXTS, long_text())
  different = [t[:60] for t in texts if our_encode(t) != their_encode(t)]
  is_ok &= not different
  print(f'token ids: {len(texts)} texts, different: {different}')
  libraries = ('jax', 'gguf', 'tokenizers', 'transformers', 'torch')
  record = dict(
    file=path.name,
    device=jax.devices()[0].device_kind,
    dtype='float32',
    max_rms=_MAX_RMS.value,
    agrees=bool(is_ok),
    versions={name: importlib.metadata.version(name) for name in libraries},
    prompts=results,
    token_texts=len(texts),
    token_texts_different=different,
  )
  output = pathlib.Path(_OUTPUT.value)
  output.parent.mkdir(parents=True, exist_ok=True)
  output.write_text(json.dumps(record, indent=2, ensure_ascii=False) + '\n')
  print(f'{"AGREES" if is_ok else "DISAGREES"}; written to {output}')
  sys.exit(0 if is_ok else 1)


if __name__ == '__main__':
  app.run(main)
