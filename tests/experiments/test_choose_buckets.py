"""The binary as a process: what it prints can be given to an engine."""

import json
import os
import pathlib
import subprocess
import sys

from jaxserve import EngineConfig

_ROOT = pathlib.Path(__file__).parent.parent.parent
_GOLDEN = pathlib.Path(__file__).parent.parent / 'golden'


def _run(*args):
  env = os.environ | {'PYTHONPATH': str(_ROOT), 'JAX_PLATFORMS': 'cpu'}
  env.pop('XLA_FLAGS', None)
  return subprocess.run(
    [
      *(sys.executable, '-m', 'experiments.choose_buckets'),
      f'--model={_GOLDEN / "llama3"}',
      *args,
    ],
    env=env,
    capture_output=True,
    text=True,
    timeout=300,
  )


def test_prints_what_an_engine_takes():
  engine = dict(
    max_num_requests=4,
    max_seq_len=32,
    max_step_tokens=16,
    token_buckets=[1, 4, 8, 16],
  )
  done = _run(
    f'--engine={json.dumps(engine)}',
    *('--max_programs=2', '--num_requests=6'),
    *('--mean_prompt=12', '--mean_new=4'),
  )
  assert not done.returncode, done.stderr[-4000:]
  chosen = json.loads(done.stdout.splitlines()[-1])
  config = EngineConfig(**engine | chosen)
  assert 1 <= len(config.buckets) <= 2
  assert config.buckets[-1] == 16
  assert done.stdout.count('chosen') == len(config.buckets)


def test_says_what_is_wrong():
  done = _run('--engine={"rows": 3}')
  assert done.returncode == 1
  assert 'rows' in done.stderr and '--engine' in done.stderr
