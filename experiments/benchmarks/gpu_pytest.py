"""The repository's own tests of GPU kernels, where pytest is."""

import importlib.util
import os
import re
import subprocess
import sys

import jax

from experiments.benchmarks.gpu_record import Section

_NEEDED = ('pytest', 'hypothesis', 'jaxtyping', 'beartype', 'absl')
_TESTS = 'tests/contracts/test_kernels.py'
_COUNT = re.compile(r'(\d+) (passed|failed|errors?|skipped|deselected)')


def run(section: Section) -> None:
  """One row: how many of those marked `gpu` pass."""
  row, who = f'pytest -m gpu {_TESTS}', 'ours'
  if section.has(row, who):
    return
  missing = [m for m in _NEEDED if importlib.util.find_spec(m) is None]
  if missing:
    section.add(row, who, skipped=f'needs {", ".join(missing)}')
    return
  env = os.environ.copy()
  if jax.default_backend() == 'gpu':
    env['JAX_PLATFORMS'] = 'cuda,cpu'
  limit = max(section.left_s, 1.0)
  command = [sys.executable, '-m', 'pytest', '-q', '-m', 'gpu', _TESTS]
  with section.trying(row, who, is_ours=True, hang_s=limit + 60):
    try:
      done = subprocess.run(
        [*command, '-p', 'no:cacheprovider'],
        env=env,
        capture_output=True,
        text=True,
        timeout=limit,
      )
    except subprocess.TimeoutExpired:
      section.add(row, who, skipped=f'not done in {limit:.0f} s')
      return
    lines = done.stdout.strip().splitlines() or ['']
    counts = {what: int(n) for n, what in _COUNT.findall(lines[-1])}
    # 5: there was no test to run.
    if done.returncode == 5:
      section.add(row, who, skipped='no test has the mark')
    elif done.returncode:
      failed = [l for l in lines if l.startswith(('FAILED', 'ERROR'))]
      text = (failed or (done.stderr.strip().splitlines() or lines)[-1:])[0]
      section.add(row, who, error=text[:300], wrong=True, **counts)
    else:
      section.add(row, who, **counts)
