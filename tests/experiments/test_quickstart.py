"""The quickstart as a process, then `generate` on what it made."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parent.parent.parent


def _run(*args, timeout_s=240):
  env = os.environ | {
    'PYTHONPATH': str(_ROOT),
    'JAX_PLATFORMS': 'cpu',
    # As in conftest.py: repeated runs compile nothing anew.
    'JAX_COMPILATION_CACHE_DIR': str(_ROOT / '.cache' / 'jax_binaries'),
  }
  env.pop('XLA_FLAGS', None)
  return subprocess.run(
    [sys.executable, '-m', *args],
    cwd=_ROOT,
    env=env,
    capture_output=True,
    text=True,
    timeout=timeout_s,
  )


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('quickstart')
  done = _run(
    'experiments.quickstart',
    f'--workdir={workdir}',
    '--config=byte_stdlib_tiny',
    '--override=mesh="data=2,fsdp=2,tensor=2"',
    '--override=steps=12',
    '--override=log_every=4',
    '--override=model.max_seq_len=128',
    '--requests=9',
  )
  assert done.returncode == 0, done.stderr
  return workdir, done.stdout


def test_ends_with_a_table_and_a_report(finished):
  workdir, printed = finished
  value = lambda name: float(
    re.search(rf'{re.escape(name)}\s+([\d.,]+)', printed)[1].replace(',', '')
  )
  # Twelve steps from chance, ln(264) = 5.6 nats.
  assert 2.0 < value('final held-out loss, nats/byte') < 5.0
  assert value('training tokens/s') > 0 and value('serving tokens/s') > 0
  assert 0 <= value('KV slots wasted, %') < 100
  assert 0 < value('goodput, %') < 100
  assert re.search(
    r'compiled programs \(training \+ serving\)\s+3 \+ 3', printed
  )
  page = (workdir / 'report.html').read_text()
  assert page.count('data:image/svg+xml') == 3
  assert page.count('<pre>') == 3


def test_generate_reads_its_checkpoint(finished):
  workdir, _ = finished
  args = (
    'experiments.generate',
    f'--model={workdir}/checkpoints',
    '--prompt=def f(x):',
    '--prompt=import',
    '--temperature=0',
    '--max_tokens=12',
    '--logprobs=2',
  )
  done = _run(*args)
  assert done.returncode == 0, done.stderr
  assert done.stdout.count('--- ') == 2 and 'def f(x):' in done.stdout
  again = _run(*args, '--simulate_devices=2', '--mesh=tensor=2')
  texts = lambda out: [s.split('\n')[1] for s in out.split('--- ')[1:]]
  assert again.returncode == 0, again.stderr
  assert texts(again.stdout) == texts(done.stdout)


@pytest.mark.parametrize(
  'args, message',
  [
    (['--prompt=x', '--model=/nothing'], "no model at '/nothing'"),
    (['--model=/nothing'], 'no prompt: give --prompt or --prompt_file'),
    (
      ['--prompt=x', '--model=/nothing', '--engine={"pages": 3}'],
      'unexpected keyword argument',
    ),
    (['--prompt=x', '--model=/nothing', '--temperature=-1'], 'temperature=-1'),
  ],
)
def test_generate_refuses_in_one_line(args, message):
  done = _run('experiments.generate', *args, timeout_s=60)
  assert done.returncode == 1
  assert message in done.stderr and 'Traceback' not in done.stderr
