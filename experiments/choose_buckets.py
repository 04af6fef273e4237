r"""Chooses the numbers of tokens that a serving engine is compiled for.

python -m experiments.choose_buckets --model=path/to/model --max_programs=4 \
    --engine='{"max_num_requests": 64, "max_seq_len": 2048}'

Compiles the engine for many sizes, measures a step of each, serves requests of
random lengths (log-normal, as in published traces) and of random tokens to see
how many tokens its steps have, and prints the sizes with the smallest expected
cost, ready for `EngineConfig(token_buckets=)` or `--engine` of
`experiments.serve`. Sizes depend on the model, the machine and the requests:
choose them where you serve.
"""

import collections
import dataclasses
import json
import math
import random
import sys

from absl import app
from absl import flags
from absl import logging

from jaxserve import LLM
from jaxserve import EngineConfig
from jaxserve import SamplingParams
from jaxserve.engine.buckets import choose_buckets
from jaxserve.engine.buckets import measure_costs
from jaxtrain.checkpoints.gguf_import import find_gemma3_270m
from jaxtrain.sharding import simulate_devices

_MODEL = flags.DEFINE_string(
  'model', None, 'Path of a model, or gemma3-270m.', required=True
)
_MESH = flags.DEFINE_string('mesh', '', "Such as 'tensor=2'.")
_SIMULATE = flags.DEFINE_integer(
  'simulate_devices', None, 'Number of CPU devices to simulate.'
)
_ENGINE = flags.DEFINE_string(
  'engine', '{}', 'EngineConfig as JSON; token_buckets are the candidates.'
)
_MAX_PROGRAMS = flags.DEFINE_integer(
  'max_programs', 4, 'Sizes to choose at most.', lower_bound=1
)
_NUM_REQUESTS = flags.DEFINE_integer(
  'num_requests', 128, 'Requests to serve.', lower_bound=1
)
_MEAN_PROMPT = flags.DEFINE_integer(
  'mean_prompt', 160, 'Mean length of prompts, in tokens.', lower_bound=1
)
_MEAN_NEW = flags.DEFINE_integer(
  'mean_new', 64, 'Mean number of generated tokens.', lower_bound=1
)
_SIGMA = 0.9  # Of the logarithms of lengths.


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)
  try:
    _run()
  except (ValueError, OSError) as e:
    sys.exit(f'choose_buckets: {e}')


def _run():
  try:
    config = EngineConfig(**json.loads(_ENGINE.value))
  except (TypeError, json.JSONDecodeError) as e:
    raise ValueError(f'--engine={_ENGINE.value!r}: {e}') from e
  usual = dataclasses.replace(config, token_buckets=None).buckets
  if config.token_buckets is None:
    config = dataclasses.replace(config, token_buckets=_candidates(config))
  if _SIMULATE.value:
    simulate_devices(_SIMULATE.value)
  is_gemma = _MODEL.value == 'gemma3-270m'
  model = find_gemma3_270m() if is_gemma else _MODEL.value
  with LLM(model, mesh=_MESH.value, engine=config) as llm:
    cost = measure_costs(llm.runner)
    histogram = _serve(llm)
  chosen = choose_buckets(
    cost, histogram, _MAX_PROGRAMS.value, reach=config.max_step_tokens
  )
  print('tokens  ms a step  steps of up to so many tokens')
  below = 0
  for size in sorted(cost):
    count = sum(n for tokens, n in histogram.items() if below < tokens <= size)
    mark = '  chosen' if size in chosen else ''
    print(f'{size:6}  {1e3 * cost[size]:9.2f}  {count:6}{mark}')
    below = size
  print(
    f'expected: {1e3 * _expected(cost, histogram, chosen):.2f} ms a step; with '
    f'a program for each: {1e3 * _expected(cost, histogram, cost):.2f}'
  )
  if set(usual) <= cost.keys():
    print(
      f'with the default {list(usual)}: '
      f'{1e3 * _expected(cost, histogram, usual):.2f}'
    )
  print(json.dumps({'token_buckets': list(chosen)}))


def _candidates(config):
  """A power of two, and one and a half of it, up to the longest step."""
  powers = [2**i for i in range(config.max_step_tokens.bit_length())]
  sizes = {*powers, *(p * 3 // 2 for p in powers), *config.buckets}
  return tuple(s for s in sorted(sizes) if s <= config.max_step_tokens)


def _serve(llm):
  """Steps by the number of their tokens."""
  rng = random.Random(0)
  longest = llm.runner.sizes.max_seq_len

  def length(mean):
    mu = math.log(mean) - _SIGMA**2 / 2
    return max(1, min(longest // 2, round(rng.lognormvariate(mu, _SIGMA))))

  prompts, params = [], []
  for _ in range(_NUM_REQUESTS.value):
    tokens = [
      rng.randrange(llm.config.vocab_size)
      for _ in range(length(_MEAN_PROMPT.value))
    ]
    prompts.append(tokens)
    params.append(
      SamplingParams(max_tokens=length(_MEAN_NEW.value), ignore_eos=True)
    )
  llm.generate(prompts, params)
  return collections.Counter(s.num_tokens for s in llm.engine.metrics.steps)


def _expected(cost, histogram, buckets):
  """Seconds of the mean step."""
  total = sum(
    n * cost[min(b for b in buckets if b >= tokens)]
    for tokens, n in histogram.items()
  )
  return total / sum(histogram.values())


if __name__ == '__main__':
  app.run(main)
