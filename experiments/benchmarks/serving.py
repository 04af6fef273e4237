r"""Serves one workload with OneMesh and with transformers, and prints ratios.

python -m experiments.benchmarks.serving --output=serving.json

The same random Qwen3-shaped model (27 M parameters, float32), the same token
prompts, greedy, end of text ignored, all requests at once. Peers, where
installed (`pip install torch transformers psutil`): transformers' continuous
batching (`generate_batch`, paged) and its padded static batch (`generate`).
Engines take turns, round by round, in one process; the first round warms up.

Tokens must agree before anything is timed: a request may differ from the peer
only from a near tie on (top two logits within 1e-3), which is counted.
"""

import gc
import importlib.util
import json
import pathlib
import random
import statistics
import tempfile
import time

from absl import app
from absl import flags
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import LLM
from jaxserve import EngineConfig
from jaxserve import SamplingParams
from jaxtrain.checkpoints.huggingface import save_huggingface
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.config import Rope
from jaxtrain.models.transformer import Transformer

_REQUESTS = flags.DEFINE_integer('requests', 32, 'Concurrent requests.')
_NEW_TOKENS = flags.DEFINE_integer('new_tokens', 48, 'Generated per request.')
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Timed rounds per engine.')
_THREADS = flags.DEFINE_integer('threads', 2, 'Threads of torch.')
_OUTPUT = flags.DEFINE_string('output', None, 'Also write JSON here.')

_CONFIG = ModelConfig(
  family='qwen3',
  vocab_size=4096,
  embed_dim=512,
  num_layers=8,
  num_heads=8,
  num_kv_heads=4,
  head_dim=64,
  mlp_dim=1536,
  max_seq_len=1024,
  rope=Rope(theta=1e6),
  qk_norm=True,
  tie_embeddings=True,
)
_TIE = 1e-3


def main(argv):
  del argv
  prompts = _workload(_REQUESTS.value)
  init = jax.jit(lambda k: nn.unbox(_model().init(k, jnp.zeros((1, 2), int))))
  params = init(jax.random.key(0))['params']
  with tempfile.TemporaryDirectory() as directory:
    save_huggingface(pathlib.Path(directory) / 'model', _CONFIG, params)
    engines = {'onemesh': _onemesh(params)} | _peers(f'{directory}/model')
    results = _measure(engines, prompts, params)
  _report(results)


def _model():
  return Transformer(_CONFIG)


def _workload(count):
  rng = random.Random(0)
  length = lambda: rng.randint(16, 128)
  return [
    [rng.randrange(4, _CONFIG.vocab_size) for _ in range(length())]
    for _ in range(count)
  ]


def _onemesh(params):
  llm = LLM(
    params,
    config=_CONFIG,
    engine=EngineConfig(
      max_num_requests=_REQUESTS.value, page_size=32, max_seq_len=512
    ),
  )
  sampling = SamplingParams(max_tokens=_NEW_TOKENS.value, temperature=0)

  def run(prompts):
    outputs = llm.generate(prompts, sampling, show_progress=False)
    return [list(out.outputs[0].token_ids) for out in outputs]

  return run


def _peers(path):
  """Engines of transformers on the same weights; empty if not installed."""
  if not all(map(importlib.util.find_spec, ('torch', 'transformers'))):
    print('torch and transformers are not installed: OneMesh alone')
    return {}
  import torch
  import transformers

  torch.set_num_threads(_THREADS.value)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    path, dtype=torch.float32
  )
  model.generation_config.eos_token_id = None
  model.generation_config.pad_token_id = 0
  count = _NEW_TOKENS.value

  def static(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor(
      [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    )
    with torch.inference_mode():
      out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
      )
    return out[:, width:].tolist()

  def continuous(prompts):
    out = model.generate_batch(
      inputs=prompts,
      generation_config=transformers.GenerationConfig(
        max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0
      ),
      continuous_batching_config=transformers.ContinuousBatchingConfig(
        page_size=32, num_blocks=512, max_batch_tokens=256
      ),
      progress_bar=False,
    )
    ordered = sorted(out.values(), key=lambda r: _number(r.request_id))
    return [list(r.generated_tokens) for r in ordered]

  found = {'transformers static': static}
  if hasattr(transformers, 'ContinuousBatchingConfig'):
    found['transformers continuous'] = continuous
  return found


def _number(request_id):
  return int(''.join(filter(str.isdigit, request_id)))


def _measure(engines, prompts, params):
  """Seconds (wall and CPU) of each engine and round, after the check."""
  first = {}
  for name, run in engines.items():
    start = time.perf_counter()
    first[name] = run(prompts)
    print(f'{name}: first round {time.perf_counter() - start:.1f} s')
  ties = {
    name: _check(prompts, tokens, first['onemesh'], params, name)
    for name, tokens in first.items()
  }
  seconds = {name: [] for name in engines}
  for _ in range(_ROUNDS.value):
    for name, run in engines.items():
      gc.collect()
      cpu, start = time.process_time(), time.perf_counter()
      tokens = run(prompts)
      seconds[name].append(
        (time.perf_counter() - start, time.process_time() - cpu)
      )
      assert tokens == first[name], f'{name} changed its tokens'
  total = len(prompts) * _NEW_TOKENS.value
  return {
    name: dict(
      tokens_per_s=round(total / statistics.median(w for w, _ in s), 1),
      tokens_per_s_best=round(total / min(w for w, _ in s), 1),
      tokens_per_cpu_s=round(total / statistics.median(c for _, c in s), 1),
      near_ties=ties[name],
    )
    for name, s in seconds.items()
  }


def _check(prompts, tokens, ours, params, name):
  """Asserts equality with OneMesh up to near ties; returns their number."""
  logits_of = jax.jit(lambda t: _model().apply({'params': params}, t)[0][0])
  ties = 0
  for prompt, theirs, mine in zip(prompts, tokens, ours, strict=True):
    assert len(theirs) == len(mine) == _NEW_TOKENS.value, name
    if theirs == mine:
      continue
    i = int(np.argmax(np.array(theirs) != np.array(mine)))
    ids = np.zeros((1, 256), np.int32)
    known = prompt + mine[:i]
    ids[0, : len(known)] = known
    row = np.asarray(logits_of(ids))[len(known) - 1]
    gap = row.max() - min(row[theirs[i]], row[mine[i]])
    assert gap < _TIE, f'{name} differs at token {i}, logits apart by {gap}'
    ties += 1
  return ties


def _report(results):
  ours = results['onemesh']
  rows = [('engine', 'tokens/s', 'best', 'tokens/CPU s', 'ratio', 'CPU ratio')]
  for name, r in results.items():
    for key in ('tokens_per_s', 'tokens_per_cpu_s'):
      r[f'onemesh_{key}_ratio'] = round(ours[key] / r[key], 2)
    rows.append(
      (
        name,
        r['tokens_per_s'],
        r['tokens_per_s_best'],
        r['tokens_per_cpu_s'],
        r['onemesh_tokens_per_s_ratio'],
        r['onemesh_tokens_per_cpu_s_ratio'],
      )
    )
  for row in rows:
    print(f'{row[0]:<26}' + ''.join(f'{str(x):>14}' for x in row[1:]))
  print('ratio: OneMesh over the engine; above 1, OneMesh is faster')
  if _OUTPUT.value:
    record = dict(
      benchmark='serving',
      requests=_REQUESTS.value,
      new_tokens=_NEW_TOKENS.value,
      rounds=_ROUNDS.value,
      torch_threads=_THREADS.value,
      jax=jax.__version__,
      results=results,
    )
    pathlib.Path(_OUTPUT.value).write_text(json.dumps(record, indent=2) + '\n')


if __name__ == '__main__':
  app.run(main)
