"""The README's code runs as it stands, and its names exist."""

import os
import pathlib
import re
import subprocess
import sys

_ROOT = pathlib.Path(__file__).parent.parent
_README = (_ROOT / 'README.md').read_text(encoding='utf-8')


def test_library_example_runs(tmp_path):
  (code,) = re.findall(r'```python\n(.*?)```', _README, re.DOTALL)
  env = dict(os.environ, PYTHONPATH=str(_ROOT), JAX_PLATFORMS='cpu')
  env.pop('XLA_FLAGS', None)
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=tmp_path,
    env=env,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert not done.returncode, done.stderr[-4000:]
  prompt = 'def main('
  written = done.stdout[done.stdout.rindex(prompt) + len(prompt) :]
  assert 8 < len(written) <= 32 + 1 + 64  # Generated, a newline, streamed.
  assert (tmp_path / 'runs' / 'readme' / 'metrics.csv').exists()


def test_paths_and_flags_exist():
  for path in re.findall(
    r'`((?:notebooks|constraints|experiments)/[^`]*)`', _README
  ):
    assert any(_ROOT.glob(path)), path
  for module, flags in re.findall(
    r'python -m ([\w.]+)((?: \\\n|[^\n`])*)', _README
  ):
    path = _ROOT / module.replace('.', '/')
    path = path / '__main__.py' if path.is_dir() else path.with_suffix('.py')
    source = path.read_text()
    for flag in re.findall(r'--(\w+)', flags):
      defined = re.search(rf"'(--)?{flag}'", source)
      assert defined, f'{module} has no --{flag}'
  makefile = (_ROOT / 'Makefile').read_text()
  for target in re.findall(r'make ([a-z-]+)', _README):
    assert f'\n{target}:' in makefile, target
  setup = (_ROOT / 'setup.py').read_text()
  for extra in re.findall(r"'\.\[(\w+)\]'", _README):
    assert f"'{extra}': [" in setup, extra
