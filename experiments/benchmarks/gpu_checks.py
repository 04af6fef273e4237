"""The kernels against reference.py, on the device: value and gradients.

python -m experiments.benchmarks.gpu_checks flash_attention bf16

As tests/contracts/test_kernels.py, without what that needs to run: every case
of every op's `cases.py` that the kernel accepts. The reference runs on the CPU,
where float32 is float32. With arguments, one case in this process, for tools
that watch it; its exit status says whether it is right.
"""

from collections.abc import Iterator
import importlib
import itertools
import pathlib
import sys
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.gpu_record import Section
import pallas_kernels
from pallas_kernels.common import dispatch

_ROOT = pathlib.Path(pallas_kernels.__file__).parent
_TOLERANCE = {'float32': 1e-5, 'bfloat16': 1e-2, 'float16': 2e-3}
# The share of the largest leaf that a leaf's RMS counts as, at least.
_FLOOR = 1e-2


def run(section: Section) -> None:
  """A row for each op and case, the ops by turns."""
  cases = list(_by_turns())
  for op, case in cases[:12] if section.smoke else cases:
    _row(section, op, case)


def _by_turns() -> Iterator[tuple[str, str]]:
  """Op and case, those in 16 bits first: the kernels are for them."""
  ops = sorted(path.parent.name for path in _ROOT.glob('*/cases.py'))
  names = {op: list(_cases(op)) for op in ops}
  for op in ops:
    names[op].sort(key=lambda name: 'bf16' not in name)
  for turn in itertools.zip_longest(*names.values()):
    for op, name in zip(names, turn, strict=True):
      if name is not None:
        yield op, name


def _cases(op):
  return importlib.import_module(f'pallas_kernels.{op}.cases').SMALL


def _row(section, op, case):
  _try(section, op, case, 'ours', section.implementation)
  # cuDNN is not here if the kernels are not.
  if (
    section.implementation == 'pallas_gpu'
    and (_ROOT / op / 'cudnn.py').exists()
  ):
    _try(section, op, case, 'cudnn', 'cudnn')


def _try(section, op, case, who, implementation):
  name = f'{op}: {case}'
  if section.has(name, who):
    return
  if not section.can_start:
    section.add(name, who, skipped='no time is left')
    return
  with section.trying(name, who, is_ours=who == 'ours'):
    error, tolerance = check(op, case, implementation)
    if error <= tolerance:
      section.add(name, who, relative_error=float(f'{error:.3g}'))
    else:
      text = f'relative error {error:.3g} > {tolerance}'
      section.add(name, who, error=text, wrong=True)


def check(op: str, case: str, implementation: str) -> tuple[float, float]:
  """Error of value and gradients, and what is allowed.

  Args:
    op: Name of its folder.
    case: Name in its `cases.SMALL`.
    implementation: Of the op.

  Raises:
    NotImplementedError: It has no such implementation, or that declines.
  """
  cpu = jax.devices('cpu')[0]
  key = zlib.crc32(op.encode())
  with jax.default_device(cpu):
    made = _cases(op)[case](jax.random.key(key))
  # Steering values, such as the sizes of groups, may be NumPy's.
  args = jax.device_put(made['args'], jax.devices()[0])
  if 'wrap' in made:
    raise NotImplementedError('it is for several devices')
  ours = dispatch.load(op, implementation)
  actual = jax.block_until_ready(_value_and_vjp(ours, made, args))
  with jax.default_device(cpu):
    reference = dispatch.load(op, 'reference')
    expected = _value_and_vjp(reference, made, made['args'])
  dtypes = {a.dtype.name for a in jax.tree.leaves(made['args'])}
  tolerance = max(_TOLERANCE[d] for d in dtypes & set(_TOLERANCE))
  pairs = zip(actual, expected, strict=True)
  return max(_error(a, e) for a, e in pairs), tolerance


def _value_and_vjp(f, made, args):
  """The result, and the gradients for a random cotangent, as one program."""
  diff, kwargs = made.get('diff', ()), made.get('kwargs', {})

  @jax.jit
  def program(args):
    def of_diff(*values):
      full = list(args)
      for i, value in zip(diff, values, strict=True):
        full[i] = value
      out = f(*full, **kwargs)
      cut = lambda leaf: leaf[: made['valid']] if 'valid' in made else leaf
      return jax.tree.map(cut, out)

    if not diff:
      return of_diff(), ()
    out, vjp = jax.vjp(of_diff, *(args[i] for i in diff))
    leaves, tree = jax.tree.flatten(out)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    draw = lambda key, leaf: jax.random.normal(key, leaf.shape, leaf.dtype)
    return out, vjp(tree.unflatten(list(map(draw, keys, leaves))))

  return program(args)


def _error(actual: Any, expected: Any) -> float:
  """Of the worst leaf: RMS of the difference over that of `expected`.

  Integers, and what is not finite, must be equal; else it is infinite.
  """
  actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
  is_float = lambda a: jnp.issubdtype(a.dtype, jnp.floating)
  floor = _FLOOR * max((_rms(e) for e in expected if is_float(e)), default=0.0)
  worst = 0.0
  for a, e in zip(actual, expected, strict=True):
    if a.shape != e.shape or a.dtype != e.dtype:
      raise ValueError(f'{a.dtype}{a.shape}, not {e.dtype}{e.shape}')
    whole = not is_float(e)
    a, e = (np.asarray(x) if whole else np.float32(x) for x in (a, e))
    finite = np.full(e.shape, False) if whole else np.isfinite(e)
    if not np.array_equal(a[~finite], e[~finite], equal_nan=not whole):
      return float('inf')
    if finite.any():
      error = _rms(a[finite] - e[finite], np.full(finite.sum(), True))
      error /= max(_rms(e), floor, 1e-30)
      # What is not finite here is wrong, and no `max` sees NaN.
      worst = max(worst, error if np.isfinite(error) else float('inf'))
  return worst


def _rms(x, finite=None):
  x = np.float32(x)
  finite = np.isfinite(x) if finite is None else finite
  x = x[finite].astype(np.float64)
  return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0


def main(argv: list[str]) -> int:
  """Runs one case."""
  op, case, *rest = argv
  error, tolerance = check(op, case, rest[0] if rest else 'pallas_gpu')
  print(f'{op}: {case}: relative error {error:.3g}, {tolerance} allowed')
  return int(not error <= tolerance)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
