r"""Times a training step of OneMesh and of transformers, and prints ratios.

python -m experiments.benchmarks.train_step --output=train_step.json

The same Llama-shaped model (4 layers, width 256, vocabulary 8192, float32), the
same first weights, the same random tokens, AdamW with clipping. The peer needs
`pip install torch transformers`. Both take turns, round by round, in one
process; the first round compiles and warms up.

Before anything is timed the losses of the first steps must agree to 1e-3.
"""

import importlib.util
import json
import pathlib
import statistics
import tempfile
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtrain import train_state
from jaxtrain import train_step
from jaxtrain.checkpoints.huggingface import save_huggingface
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import make_mesh

_BATCH = flags.DEFINE_integer('batch_size', 8, 'Rows.')
_SEQ_LEN = flags.DEFINE_integer('seq_len', 256, 'Tokens per row.')
_STEPS = flags.DEFINE_integer('steps', 4, 'Steps per round.')
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Timed rounds of each.')
_THREADS = flags.DEFINE_integer('threads', 2, 'Threads of torch.')
_OUTPUT = flags.DEFINE_string('output', None, 'Also write JSON here.')

_CONFIG = ModelConfig(
  family='llama',
  vocab_size=8192,
  embed_dim=256,
  num_layers=4,
  num_heads=4,
  num_kv_heads=4,
  head_dim=64,
  mlp_dim=688,
  max_seq_len=256,
)
_ADAMW = dict(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
_LEARNING_RATE = 1e-3


def main(argv):
  del argv
  rng = np.random.default_rng(0)
  tokens = rng.integers(
    0, _CONFIG.vocab_size, (_BATCH.value, _SEQ_LEN.value + 1), np.int32
  )
  model = Transformer(_CONFIG)
  # Decay everywhere, as torch's AdamW does by default.
  tx = optax.adamw(_LEARNING_RATE, **_ADAMW)
  mesh, rules = make_mesh(), PRESETS['default']
  state = train_state.init_state(model, tx, mesh, rules)
  with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory) / 'model'
    save_huggingface(path, _CONFIG, state.params)
    trainers = {'onemesh': _onemesh(model, tx, mesh, rules, state, tokens)}
    if all(map(importlib.util.find_spec, ('torch', 'transformers'))):
      trainers['transformers'] = _transformers(path, tokens)
    else:
      print('torch and transformers are not installed: OneMesh alone')
  _report(_measure(trainers))


def _onemesh(model, tx, mesh, rules, state, tokens):
  step = train_step.make_train_step(model, tx, mesh, rules)
  ones = np.ones((_BATCH.value, _SEQ_LEN.value))
  batch = dict(
    tokens=tokens[:, :-1],
    targets=tokens[:, 1:],
    positions=np.broadcast_to(np.arange(_SEQ_LEN.value), ones.shape),
    segment_ids=ones,
    weights=ones,
  )
  batch = {
    k: jnp.asarray(v, jnp.float32 if k == 'weights' else jnp.int32)
    for k, v in batch.items()
  }

  def run(count):
    nonlocal state
    losses = []
    for _ in range(count):
      state, metrics = step(state, batch)
      losses.append(metrics['nll'])
    return [float(x) for x in losses]

  return run


def _transformers(path, tokens):
  import torch
  import transformers

  torch.set_num_threads(_THREADS.value)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    path, dtype=torch.float32
  )
  model.train()
  adamw = dict(_ADAMW)
  betas = adamw.pop('b1'), adamw.pop('b2')
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=_LEARNING_RATE, betas=betas, **adamw
  )
  ids = torch.tensor(tokens[:, :-1], dtype=torch.long)
  targets = torch.tensor(tokens[:, 1:], dtype=torch.long)

  def run(count):
    losses = []
    for _ in range(count):
      logits = model(input_ids=ids).logits
      loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten()
      )
      loss.backward()
      torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
      optimizer.step()
      optimizer.zero_grad(set_to_none=True)
      losses.append(loss.item())
    return losses

  return run


def _measure(trainers):
  losses = {}
  for name, run in trainers.items():
    start = time.perf_counter()
    losses[name] = run(_STEPS.value)
    print(
      f'{name}: first round {time.perf_counter() - start:.1f} s, '
      f'losses {" ".join(f"{x:.4f}" for x in losses[name])}'
    )
  for name, values in losses.items():
    np.testing.assert_allclose(
      values, losses['onemesh'], atol=1e-3, err_msg=name
    )
  seconds = {name: [] for name in trainers}
  for _ in range(_ROUNDS.value):
    for name, run in trainers.items():
      cpu, start = time.process_time(), time.perf_counter()
      run(_STEPS.value)
      seconds[name].append(
        (time.perf_counter() - start, time.process_time() - cpu)
      )
  tokens = _STEPS.value * _BATCH.value * _SEQ_LEN.value
  return {
    name: dict(
      tokens_per_s=round(tokens / statistics.median(w for w, _ in s)),
      tokens_per_s_best=round(tokens / min(w for w, _ in s)),
      tokens_per_cpu_s=round(tokens / statistics.median(c for _, c in s)),
    )
    for name, s in seconds.items()
  }


def _report(results):
  ours = results['onemesh']
  print(f'{"trainer":<16}{"tokens/s":>12}{"best":>12}{"tokens/CPU s":>14}')
  for name, r in results.items():
    print(
      f'{name:<16}{r["tokens_per_s"]:>12}{r["tokens_per_s_best"]:>12}'
      f'{r["tokens_per_cpu_s"]:>14}'
    )
    for key in list(r):
      r[f'onemesh_{key}_ratio'] = round(ours[key] / r[key], 2)
  for name, r in results.items():
    if name != 'onemesh':
      print(
        f'OneMesh over {name}: {r["onemesh_tokens_per_s_ratio"]}x tokens/s, '
        f'{r["onemesh_tokens_per_cpu_s_ratio"]}x tokens/CPU s'
      )
  if _OUTPUT.value:
    record = dict(
      benchmark='train_step',
      batch_size=_BATCH.value,
      seq_len=_SEQ_LEN.value,
      torch_threads=_THREADS.value,
      jax=jax.__version__,
      results=results,
    )
    pathlib.Path(_OUTPUT.value).write_text(json.dumps(record, indent=2) + '\n')


if __name__ == '__main__':
  app.run(main)
