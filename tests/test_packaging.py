"""What setup.py asks for is pinned, and every package would be installed."""

import ast
import pathlib

from packaging import requirements
from packaging import utils
import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_PACKAGES = ('pallas_kernels', 'jaxtrain', 'jaxserve', 'experiments')
_CONSTRAINTS = sorted((_ROOT / 'constraints').glob('py*.txt'))


def _setup(keyword):
  for node in ast.walk(ast.parse((_ROOT / 'setup.py').read_text())):
    if isinstance(node, ast.keyword) and node.arg == keyword:
      return ast.literal_eval(node.value)
  raise AssertionError(f'setup.py has no {keyword}')


def _pins(path):
  pins = {}
  for line in path.read_text().splitlines():
    if line and not line.startswith('#'):
      name, _, version = line.partition('==')
      pins[utils.canonicalize_name(name)] = version
  return pins


@pytest.mark.parametrize('path', _CONSTRAINTS, ids=lambda p: p.stem)
def test_pins_satisfy_setup(path):
  pins = _pins(path)
  wanted = _setup('install_requires') + _setup('extras_require')['test']
  for text in wanted:
    r = requirements.Requirement(text)
    version = pins.get(utils.canonicalize_name(r.name))
    assert version and r.specifier.contains(version), f'{text}: {version}'
  # Versions only: no path, no address, no git revision of one machine.
  for name, version in pins.items():
    assert version[:1].isdigit() and '/' not in version, name


def test_oldest_and_newest_jax_are_pinned():
  assert [p.stem for p in _CONSTRAINTS] == ['py311', 'py312']
  oldest, newest = (_pins(p)['jax'] for p in _CONSTRAINTS)
  assert f'jax>={oldest}' in _setup('install_requires')
  assert tuple(map(int, newest.split('.'))) > tuple(map(int, oldest.split('.')))


def test_folders_with_code_are_packages():
  wrong = [
    str(path.parent.relative_to(_ROOT))
    for package in _PACKAGES
    for path in (_ROOT / package).rglob('*.py')
    if not (path.parent / '__init__.py').exists()
  ]
  assert not wrong
