r"""Trains a byte-level model and serves it: the whole library in one command.

python -m experiments.quickstart

On simulated devices of a laptop, or on real ones with `--simulate_devices=0`:
trains on the text of Python's standard library on one mesh, checkpoints,
restores onto another mesh, serves a mixed load from the checkpoint, and writes
`runs/quickstart/report.html`. Interrupted, it goes on where it stopped.
"""

import pathlib
import random
import sys
import time

from absl import app
from absl import flags
from absl import logging

from experiments import configs
from experiments import report
from experiments import training
from jaxserve import LLM
from jaxserve import EngineConfig
from jaxserve import SamplingParams
from jaxtrain import data
from jaxtrain import goodput
from jaxtrain import metrics as metrics_lib
from jaxtrain.sharding import simulate_devices

_WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/quickstart', 'Folder of the run.'
)
_CONFIG = flags.DEFINE_string(
  'config', 'quickstart', 'See --config of train_lm.'
)
_OVERRIDE = flags.DEFINE_multi_string(
  'override', [], 'See --override of train_lm.'
)
_SIMULATE = flags.DEFINE_integer(
  'simulate_devices', 8, 'CPU devices to simulate; 0 takes those there are.'
)
_SERVE_MESH = flags.DEFINE_string('serve_mesh', 'tensor=2', 'Mesh to serve on.')
_REQUESTS = flags.DEFINE_integer('requests', 64, 'Requests to serve.')

_PROMPTS = (
  'def read_lines(path):\n    """Return the lines of a text file."""\n',
  'import os\nimport sys\n\n\nclass ',
  'The following example shows how to ',
)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step it takes.
  if _SIMULATE.value:
    simulate_devices(_SIMULATE.value)
  workdir = pathlib.Path(_WORKDIR.value)
  try:
    config = configs.load(_CONFIG.value, _OVERRIDE.value)
    configs.check(config, training.run, training.OPTIONS)
    result = _train(workdir, config)
    served = _serve(workdir, config)
  except (ValueError, OSError) as e:
    sys.exit(f'quickstart: {e}')
  curve = {
    name: _column(workdir, name)
    for name in ('loss', 'eval_loss', 'tokens_per_s')
  }
  rows = _summary(config, result, curve, served)
  rows.append(('goodput, %', 100 * goodput.read(workdir).fractions['step']))
  path = report.write_report(
    workdir / 'report.html',
    title='OneMesh quickstart',
    summary_rows=rows,
    loss_curve={
      'train': curve['loss'],
      'held-out': curve['eval_loss'],
    },
    kv_pages_over_time=[
      (s.time_s, s.pages_in_use, s.cached_tokens) for s in served['steps']
    ],
    page_size=served['page_size'],
    completions=served['completions'],
    goodput=goodput.read(workdir),
    notes=(
      f'Trained on {config.get("mesh") or "one device"}, served on '
      f'{_SERVE_MESH.value or "one device"}, from the same checkpoint.'
    ),
  )
  print(report.text_table(rows))
  print(f'\nreport: {path}')


def _train(workdir, config):
  """Trains, or goes on; stops the program if a signal ended it."""
  print(f'1/3 training on {config.get("mesh") or "one device"}')
  result = training.run(workdir, **config)
  if result.stopped_by not in (None, 'data'):
    sys.exit(
      f'stopped by {result.stopped_by} at step {result.step}; the same command '
      'goes on from there'
    )
  return result


def _serve(workdir, config):
  """Restores onto the serving mesh and runs the load and the samples."""
  print(f'2/3 restoring onto {_SERVE_MESH.value or "one device"}')
  engine = EngineConfig(max_step_tokens=128)
  with LLM(
    workdir / 'checkpoints', mesh=_SERVE_MESH.value, engine=engine
  ) as llm:
    prompts, params = _load(llm, _REQUESTS.value, config)
    print(f'3/3 serving {len(prompts)} requests')
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    elapsed_s = time.perf_counter() - start
    metrics = llm.engine.metrics
    served = dict(
      tokens_per_s=sum(len(o.outputs[0].token_ids) for o in outputs)
      / elapsed_s,
      wasted=metrics.wasted_slots_fraction,
      steps=list(metrics.steps),
      page_size=engine.page_size,
      num_programs=llm.runner.num_programs,
      compile_s=llm.runner.compile_s,
    )
    samples = llm.generate(
      _PROMPTS,
      SamplingParams(
        max_tokens=160, temperature=0.6, min_p=0.05, seed=0, ignore_eos=True
      ),
      show_progress=False,
    )
  served['completions'] = [(o.prompt, o.text) for o in samples]
  return served


def _load(llm, count, config):
  """Held-out text of mixed lengths to go on from, greedy and sampled."""
  rng = random.Random(0)
  source = config.get('source', 'stdlib')
  options = {'name': source} if isinstance(source, str) else dict(source)
  documents = data.get(options.pop('name'))(split='validation', **options)
  room = llm.config.max_seq_len
  prompts, params = [], []
  for i in range(count):
    text = documents[rng.randrange(len(documents))]
    start = rng.randrange(max(1, len(text) - room))
    ids = llm.tokenizer.encode(
      text[start : start + rng.randint(4, room // 2)] or '\n', add_bos=True
    )
    prompts.append(ids[: room // 2])
    params.append(
      SamplingParams(
        max_tokens=rng.randint(8, room // 4),
        temperature=0.0 if i % 2 else 0.8,
        seed=i,
      )
    )
  return prompts, params


def _column(workdir, name):
  """(step, value) of one metric, from the run's own record."""
  rows = metrics_lib.read(workdir)
  return [(int(r['step']), float(r[name])) for r in rows if r.get(name)]


def _summary(config, result, curve, served):
  rates = sorted(rate for _, rate in curve['tokens_per_s'])
  return [
    ('final held-out loss, nats/byte', curve['eval_loss'][-1][1]),
    ('training steps', config['steps']),
    ('training tokens/s', rates[len(rates) // 2]),
    ('serving tokens/s', served['tokens_per_s']),
    ('KV slots wasted, %', 100 * served['wasted']),
    (
      'compiled programs (training + serving)',
      f'{result.num_programs} + {served["num_programs"]}',
    ),
    (
      'seconds compiling (training + serving)',
      f'{result.compile_s:.1f} + {served["compile_s"]:.1f}',
    ),
  ]


if __name__ == '__main__':
  app.run(main)
