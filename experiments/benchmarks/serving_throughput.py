"""Output tokens per second against other engines.

Scenarios: 32 and 256 requests at once (16 to 128 tokens in, 48 out); 64
requests of 512 tokens of which the first 50 % and 90 % are shared by all of a
round (32 out), prefix caches on; 32 requests to Gemma 3 270M (32 out).
"""

import random
from typing import Any

from experiments.benchmarks import serving_rounds
from experiments.benchmarks.serving_processes import EngineError
from experiments.benchmarks.serving_processes import start_onemesh
from experiments.benchmarks.serving_processes import start_peer
from experiments.benchmarks.serving_settings import Settings
from experiments.benchmarks.serving_settings import emit
from experiments.benchmarks.serving_ties import Ties

_PEERS = ('vllm_cpu', 'openvino_batch', 'transformers_batch')
_PROMPT_LEN = 512
_STEP_TOKENS = 512


def throughput_32(settings: Settings) -> dict[str, Any]:
  """32 requests at once."""
  return _at_once(settings, 'throughput_32', settings.count(32))


def throughput_256(settings: Settings) -> dict[str, Any]:
  """256 requests at once."""
  return _at_once(settings, 'throughput_256', settings.count(256))


def gemma(settings: Settings) -> dict[str, Any]:
  """32 requests to Gemma 3 270M."""
  return _at_once(
    settings, 'gemma', settings.count(32), 'gemma3-270m', max_tokens=32
  )


def prefix_50(settings: Settings) -> dict[str, Any]:
  """64 requests that share half of their prompts."""
  return _prefix(settings, 50)


def prefix_90(settings: Settings) -> dict[str, Any]:
  """64 requests that share nine tenths of their prompts."""
  return _prefix(settings, 90)


def _prefix(settings, percent):
  count = settings.count(64)
  vocab_size = settings.model('qwen3-27m').vocab_size
  shared_len = _PROMPT_LEN * percent // 100

  def prompts(i):
    rng = random.Random(i)
    draw = lambda n: [rng.randrange(4, vocab_size) for _ in range(n)]
    system = draw(shared_len)
    return [system + draw(_PROMPT_LEN - shared_len) for _ in range(count)]

  return _compare(
    settings,
    f'prefix_{percent}',
    'qwen3-27m',
    prompts,
    count=count,
    max_tokens=32,
    longest=_PROMPT_LEN,
    prefix_cache=True,
  )


def _at_once(settings, scenario, count, model='qwen3-27m', max_tokens=48):
  vocab_size = min(settings.model(model).vocab_size, 4096)
  lengths = random.Random(0)
  lengths = [lengths.randint(16, 128) for _ in range(count)]

  def prompts(i):
    rng = random.Random(i)
    return [[rng.randrange(4, vocab_size) for _ in range(n)] for n in lengths]

  return _compare(
    settings,
    scenario,
    model,
    prompts,
    count=count,
    max_tokens=max_tokens,
    longest=128,
    prefix_cache=False,
  )


def _compare(
  settings,
  scenario,
  model,
  prompts_of,
  *,
  count,
  max_tokens,
  longest,
  prefix_cache,
):
  max_seq_len = -(-(longest + max_tokens) // 64) * 64
  job = settings.job(
    model,
    max_num_requests=count,
    max_seq_len=max_seq_len,
    page_size=32,
    max_step_tokens=max(_STEP_TOKENS, count),
    kv_gigabytes=2,
    prefix_cache=prefix_cache,
  )
  engines, absent = {}, {}
  try:
    engines['onemesh'] = start_onemesh(job)
    for name in _PEERS:
      try:
        engines[name] = start_peer(name, settings.peer_python, job)
      except EngineError as e:
        absent[name] = str(e)
        emit(scenario=scenario, engine=name, absent=str(e))
    results = serving_rounds.measure(
      scenario,
      engines,
      prompts_of,
      max_tokens,
      settings.rounds,
      Ties(job['model'], max_seq_len),
    )
  finally:
    for process in engines.values():
      process.close()
  return dict(requests=count, engines=results, absent=absent)
