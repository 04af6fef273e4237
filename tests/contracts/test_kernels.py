"""Every backend of every op agrees with reference.py, forward and backward.

An op takes part by having `pallas_kernels/<op>/cases.py` with
`SMALL: dict[str, Callable[[key], dict]]`. Each function builds one input:

* `args`: positional arguments, arrays or `None`;
* `kwargs`: static keyword arguments;
* `diff`: indices of the arguments to differentiate; absent or empty for ops
  without a derivative;
* `valid`: how many leading rows of the result are defined; absent means all;
* `wrap`: for ops that devices run together, what makes of the op on each one's
  part a function of the whole arrays.

`reference.<op>(*args, **kwargs)` may return any pytree. Its float leaves must
agree within the tolerance of the coarsest dtype among the arguments, its
integer leaves exactly. GPU kernels are interpreted, and run where there is one.
"""

import contextlib
import functools
import importlib
import pathlib
import zlib

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.common import dispatch
from pallas_kernels.common import hopper
from tests.pallas_kernels.gpu.async_wgmma import async_wgmma

_BACKENDS = ('xla', 'pallas_tpu', 'pallas_gpu')
_ROOT = pathlib.Path(pallas_kernels.__file__).parent
# RMS error allowed relative to the RMS of the reference.
_RMS_TOLERANCE = {'float32': 1e-5, 'bfloat16': 1e-2, 'float16': 2e-3}


def _ops():
  return sorted(p.parent.name for p in _ROOT.glob('*/cases.py'))


def _cases(op):
  return importlib.import_module(f'pallas_kernels.{op}.cases').SMALL


def _has(op, backend):
  return (_ROOT / op / f'{backend}.py').exists()


def _params():
  for op in _ops():
    for backend in _BACKENDS:
      if _has(op, backend):
        for name, build in _cases(op).items():
          yield pytest.param(op, backend, build, id=f'{op}-{backend}-{name}')
          if backend == 'pallas_gpu':
            yield pytest.param(
              *(op, 'on_a_gpu', build),
              marks=pytest.mark.gpu,
              id=f'{op}-on_a_gpu-{name}',
            )


def _tolerance(case):
  """That of the coarsest float dtype among the arguments."""
  dtypes = {a.dtype.name for a in jax.tree.leaves(case['args'])}
  return max(_RMS_TOLERANCE[d] for d in dtypes & set(_RMS_TOLERANCE))


def _assert_close(actual, expected, tolerance):
  """Compares two pytrees leaf by leaf; `expected` sets the scale."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
  # A leaf that should vanish has no scale of its own.
  floor = 1e-2 * max((_rms(e) for e in expected if _is_float(e)), default=0)
  for a, e in zip(actual, expected, strict=True):
    assert a.shape == e.shape and a.dtype == e.dtype
    if not _is_float(e):
      np.testing.assert_array_equal(a, e)
      continue
    a, e = np.float32(a), np.float32(e)
    # Masked positions may be infinite; then they are so in both.
    finite = np.isfinite(e)
    np.testing.assert_array_equal(a[~finite], e[~finite])
    a, e = a[finite], e[finite]
    assert _rms(a - e) <= tolerance * max(_rms(e), floor)
    worst = 10 * tolerance * max(np.abs(e).max(initial=0), floor)
    np.testing.assert_allclose(a, e, atol=worst, rtol=0)


def _is_float(a):
  return jnp.issubdtype(a.dtype, jnp.floating)


def _rms(a):
  a = np.float32(a)
  a = a[np.isfinite(a)]
  return np.sqrt(np.mean(np.square(a))) if a.size else 0.0


def _whole(f, case):
  """An op of many devices' parts as a function of the whole arrays."""
  return case['wrap'](f) if 'wrap' in case else f


def _value_and_vjp(f, case):
  """The result, and the gradients of the `diff` arguments for a random dy."""
  kwargs = case.get('kwargs', {})
  diff = case.get('diff', ())

  @jax.jit
  def run(args):
    def of_diff(*values):
      full = list(args)
      for i, value in zip(diff, values, strict=True):
        full[i] = value
      out = _whole(f, case)(*full, **kwargs)
      if 'valid' in case:
        out = jax.tree.map(lambda leaf: leaf[: case['valid']], out)
      return out

    if not diff:
      return of_diff(), ()
    out, vjp = jax.vjp(of_diff, *(args[i] for i in diff))
    leaves, tree = jax.tree.flatten(out)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    dy = [
      jax.random.normal(k, leaf.shape, leaf.dtype)
      for k, leaf in zip(keys, leaves, strict=True)
    ]
    return out, vjp(tree.unflatten(dy))

  return run(case['args'])


@pytest.mark.parametrize('op, backend, build', list(_params()))
def test_matches_reference(op, backend, build):
  case = build(jax.random.key(zlib.crc32(op.encode())))
  if backend == 'pallas_gpu' and not hopper.can_interpret():
    pytest.skip('needs the GPU interpreter of JAX 0.12')
  try:
    with contextlib.ExitStack() as stack:
      if backend == 'on_a_gpu':
        backend = 'pallas_gpu'
        stack.enter_context(pltpu.force_tpu_interpret_mode(None))
      elif backend == 'pallas_gpu':
        stack.enter_context(hopper.interpret())
        stack.enter_context(async_wgmma())
      actual = _value_and_vjp(dispatch.load(op, backend), case)
  except NotImplementedError as e:
    pytest.skip(f'unsupported, falls back: {e}')
  expected = _value_and_vjp(dispatch.load(op, 'reference'), case)
  for a, e in zip(actual, expected, strict=True):
    _assert_close(a, e, _tolerance(case))


@pytest.mark.parametrize('op', _ops())
def test_has_a_reference_and_an_api_of_its_name(op):
  assert callable(dispatch.load(op, 'reference'))
  assert callable(getattr(importlib.import_module(f'pallas_kernels.{op}'), op))


@pytest.mark.parametrize('op', _ops())
def test_dispatch_picks_a_backend_for_every_case(op):
  for name, build in _cases(op).items():
    case = build(jax.random.key(0))
    shapes = [
      jax.eval_shape(
        functools.partial(_whole(f, case), **case['kwargs']), *case['args']
      )
      for f in (
        functools.partial(dispatch.dispatch, op),
        dispatch.load(op, 'reference'),
      )
    ]
    assert shapes[0] == shapes[1], name
