"""Output tokens per second of the engine, on nano-vllm's workload.

`bench.py` of https://github.com/GeeeekExplorer/nano-vllm: with `seed(0)` 256
requests of 100 to 1,024 random tokens, each continued by 100 to 1,024 tokens,
133,966 in all, at temperature 0.6, end of text ignored. The model is as large
as Qwen3-0.6B; weights are random.

The floor is of any schedule: each step reads the weights once and there are as
many steps as the longest continuation has tokens; each token reads the cache of
its request once; prompts cost nothing.
"""

from collections.abc import Sequence
import dataclasses
import random
import time
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.gpu_record import Section
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.engine.runner import Runner
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.parity import logprob_parity
from jaxtrain.models.families.qwen3 import QWEN_3_0_6B
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import make_mesh
from jaxtrain.sharding import param_shardings
from jaxtrain.sharding.partition import fit_rules

_ENGINE = EngineConfig(
  max_num_requests=256,
  max_seq_len=2048,
  page_size=64,
  max_step_tokens=8192,
  token_buckets=(64, 256, 2048, 8192),
  prefix_cache=False,
)
_SMOKE_MODEL = dataclasses.replace(
  QWEN_3_0_6B,
  vocab_size=512,
  embed_dim=64,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=32,
  mlp_dim=128,
)
_SMOKE_ENGINE = dataclasses.replace(
  _ENGINE,
  max_num_requests=4,
  max_seq_len=64,
  page_size=8,
  max_step_tokens=16,
  token_buckets=(16,),
)
# Of what the device has; the rest is for weights and activations.
_CACHE_SHARE = 0.5
_DEFAULT_CACHE_BYTES = 1 << 30
_LONGEST = 1024
_NUM_REQUESTS = 256
# Mean difference, in nats, from log-probabilities of a whole forward pass.
_TOLERANCE = {'bfloat16': 0.05, 'float32': 1e-3}


@dataclasses.dataclass(frozen=True)
class Workload:
  """Prompts, and how many tokens follow each."""

  prompts: Sequence[Sequence[int]]
  lengths: Sequence[int]


def workload(count: int, longest: int, vocab_size: int) -> Workload:
  """nano-vllm's, at its own sizes.

  Args:
    count: Requests.
    longest: Tokens in, and out, at most; a tenth of it at the least.
    vocab_size: Tokens are below it, and at most 10,000.
  """
  draw = random.Random(0).randint
  shortest, last = round(longest * 100 / 1024), min(10_000, vocab_size - 1)
  prompts = [
    [draw(0, last) for _ in range(draw(shortest, longest))]
    for _ in range(count)
  ]
  return Workload(prompts, [draw(shortest, longest) for _ in range(count)])


def run(section: Section) -> None:
  """One step a call, then eight where all that runs is decoding."""
  config = _SMOKE_MODEL if section.smoke else QWEN_3_0_6B
  dtype = jnp.float32 if section.smoke else jnp.bfloat16
  count, longest = (6, 24) if section.smoke else (_NUM_REQUESTS, _LONGEST)
  load = workload(count, longest, config.vocab_size)
  row = f'{config.family} {"tiny" if section.smoke else "0.6b"}, '
  row += f'{count} requests'
  params, mesh, rules = _parameters(config, dtype)
  for steps in (1,) if section.smoke else (1, 8):
    name = f'ours, {steps} steps a call'
    if section.has(row, name):
      continue
    if not section.can_start:
      section.add(row, name, skipped='no time is left')
      continue
    engine = _SMOKE_ENGINE if section.smoke else _ENGINE
    engine = dataclasses.replace(
      engine, decode_steps=steps, cache_bytes=_cache_bytes(section)
    )
    # Compiling all of its programs takes a while: only the end counts.
    limit = section.left_s + 60
    with section.trying(row, name, is_ours=True, hang_s=limit):
      served = _Served(config, params, mesh, rules, engine, dtype)
      try:
        error = _check(served, config, params, load)
        if not error <= _TOLERANCE[jnp.dtype(dtype).name]:
          text = f'log-probabilities differ by {error:.3g} nats'
          section.add(row, name, error=text, wrong=True)
          continue
        fields = _time(section, served, config, params, load)
        section.add(row, name, logprob_error=error, **fields)
      finally:
        served.runner.close()


def _cache_bytes(section):
  stats = jax.devices()[0].memory_stats() or {}
  if section.smoke or 'bytes_limit' not in stats:
    return _DEFAULT_CACHE_BYTES
  free = stats['bytes_limit'] - stats.get('bytes_in_use', 0)
  return int(_CACHE_SHARE * free)


def _parameters(config, dtype):
  """Random weights, and where they are."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  init = lambda: Transformer(config).init(jax.random.key(0), tokens)['params']
  boxed = jax.eval_shape(init)
  mesh = make_mesh('', devices=jax.devices()[:1])
  rules = fit_rules(boxed, mesh, PRESETS['tensor_parallel'])
  cast = lambda: jax.tree.map(lambda x: x.astype(dtype), nn.unbox(init()))
  shardings = param_shardings(boxed, mesh, rules)
  return jax.jit(cast, out_shardings=shardings)(), mesh, rules


class _Served:
  """An engine that notes how long the host waits for the device."""

  def __init__(self, config, params, mesh, rules, engine, dtype):
    sizes = engine.max_seq_len, engine.page_size
    pages = engine.max_num_requests * -(-sizes[0] // sizes[1])
    bytes_per_token = kv_bytes_per_token(config, dtype)
    fit = engine.cache_bytes // (bytes_per_token * engine.page_size)
    static = dict(num_pages=min(pages, fit), max_seq_len=engine.max_seq_len)
    start = time.perf_counter()
    self.runner = Runner(
      *(config, params, mesh, rules, engine), **static, dtype=dtype
    )
    self.start_s = time.perf_counter() - start
    self.waited_s = 0.0
    run = self.runner.run
    self.runner.run = lambda *args: _Result(self, run(*args))
    self.engine = Engine(
      self.runner, engine, **static, vocab_size=config.vocab_size
    )


class _Result:
  """Of a step; adds to the time waited for the device."""

  def __init__(self, served, result):
    self._served, self._result = served, result

  def read(self):
    start = time.perf_counter()
    found = self._result.read()
    self._served.waited_s += time.perf_counter() - start
    return found

  def __getattr__(self, name):
    return getattr(self._result, name)


def kv_bytes_per_token(config: Any, dtype: Any) -> int:
  """Keys and values of all layers."""
  heads = 2 * config.num_layers * config.num_kv_heads
  return heads * config.head_dim * jnp.dtype(dtype).itemsize


def _check(served, config, params, load):
  """Mean difference of a few requests' log-probabilities from a trainer's."""
  greedy = SamplingParams(
    max_tokens=8, temperature=0, ignore_eos=True, logprobs=0
  )
  for prompt in load.prompts[:2]:
    served.engine.add_request(prompt, greedy)
  outputs = []
  while served.engine.num_unfinished:
    outputs += served.engine.step()
  return logprob_parity(config, params, outputs).mean


def _time(section, served, config, params, load):
  """Serves all of it, or as much as there is time for."""
  engine, metrics = served.engine, served.engine.metrics
  before, first_step = metrics.num_generated, metrics.num_steps
  host_ms = []
  start = time.perf_counter()
  for prompt, length in zip(load.prompts, load.lengths, strict=True):
    sampling = SamplingParams(
      max_tokens=length, temperature=0.6, ignore_eos=True
    )
    engine.add_request(prompt, sampling)
  while engine.num_unfinished and section.left_s > 0:
    waited, began = served.waited_s, time.perf_counter()
    engine.step()
    waited = served.waited_s - waited
    host_ms.append(1e3 * (time.perf_counter() - began - waited))
  seconds = time.perf_counter() - start
  generated = metrics.num_generated - before
  finished = not engine.num_unfinished
  wanted = sum(load.lengths)
  if finished and generated != wanted:
    raise ValueError(f'{generated} tokens came, not {wanted}')
  at = np.array([s.time_s for s in metrics.steps])[first_step:]
  fields = dict(
    tokens_per_s=round(generated / seconds, 1),
    seconds=round(seconds, 3),
    tokens=generated,
    all_finished=finished,
    steps=metrics.num_steps - first_step,
    padding_fraction=round(metrics.padding_fraction, 4),
    preemptions=metrics.num_preemptions,
    start_s=round(served.start_s, 1),
    # The time of `step` less that of waiting for the device: where it is above
    # that of a step on the device, the device idles for the difference.
    host_ms_per_step=_quantiles(host_ms),
    ms_between_dispatches=_quantiles(1e3 * np.diff(at)),
  )
  bandwidth = section.peaks().get('bytes_per_s')
  if finished and bandwidth:
    dtype = params['embed']['embedding'].dtype
    floor = floor_bytes(config, params, dtype, load) / bandwidth
    fields |= dict(share=round(floor / seconds, 4), bound='memory')
  return fields


def floor_bytes(config: Any, params: Any, dtype: Any, load: Workload) -> float:
  """What any schedule reads of the memory; see the top."""
  weights = sum(x.nbytes for x in jax.tree.leaves(params))
  cached = sum(
    # Token i of n is computed from the prompt and i others.
    len(prompt) * n + n * (n - 1) / 2
    for prompt, n in zip(load.prompts, load.lengths, strict=True)
  )
  per_token = kv_bytes_per_token(config, dtype)
  return float(weights * max(load.lengths) + per_token * cached)


def _quantiles(values):
  if not len(values):
    return {}
  found = np.percentile(values, [50, 99, 100])
  return dict(zip(('p50', 'p99', 'max'), found.round(3).tolist(), strict=True))
