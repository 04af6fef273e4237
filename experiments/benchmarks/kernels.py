r"""Times every implementation of an op on its model-sized cases.

python -m experiments.benchmarks.kernels --op=ragged_paged_attention \
    --cases=cpu

Prints one JSON line per case, implementation and mode ('forward', and 'vjp'
where the op has one): wall and CPU milliseconds. An implementation that
disagrees with reference.py is an error, not a time.
"""

import functools
import importlib
import json
import pathlib
import statistics
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common import dispatch

_OP = flags.DEFINE_string(
  'op', None, 'Folder under pallas_kernels/.', required=True
)
_IMPLEMENTATIONS = flags.DEFINE_list(
  'implementations', ['xla', 'pallas_tpu', 'pallas_gpu'], 'What to time.'
)
_CASES = flags.DEFINE_string(
  'cases', '', 'Only cases whose name contains this.'
)
_ITERATIONS = flags.DEFINE_integer('iterations', 20, 'Timed calls per case.')
_OUTPUT = flags.DEFINE_string('output', None, 'Also append the lines here.')

_TOLERANCE = {'float32': 1e-4, 'bfloat16': 2e-2, 'float16': 4e-3}


def main(argv):
  del argv
  cases = importlib.import_module(f'pallas_kernels.{_OP.value}.cases').MODEL
  chosen = {n: f for n, f in cases.items() if _CASES.value in n}
  if not chosen:
    raise app.UsageError(
      f'no case of {_OP.value} contains {_CASES.value!r}: {", ".join(cases)}'
    )
  for name, build in chosen.items():
    case = build(jax.random.key(0))
    for mode in ('forward', 'vjp') if case.get('diff') else ('forward',):
      expected = _function('reference', case, mode)(case['args'])
      for implementation in _IMPLEMENTATIONS.value:
        _time(name, implementation, mode, case, expected)


def _function(implementation, case, mode):
  f = functools.partial(
    dispatch.load(_OP.value, implementation), **case.get('kwargs', {})
  )

  @jax.jit
  def forward(args):
    out = f(*args)
    keep = lambda leaf: leaf[: case['valid']] if 'valid' in case else leaf
    return jax.tree.map(keep, out)

  @jax.jit
  def vjp(args):
    def of_diff(*values):
      full = list(args)
      for i, value in zip(case['diff'], values, strict=True):
        full[i] = value
      return f(*full)

    out, pull = jax.vjp(of_diff, *(args[i] for i in case['diff']))
    return pull(jax.tree.map(jnp.ones_like, out))

  return forward if mode == 'forward' else vjp


def _time(name, implementation, mode, case, expected):
  line = dict(op=_OP.value, case=name, implementation=implementation, mode=mode)
  try:
    f = _function(implementation, case, mode)
    actual = jax.block_until_ready(f(case['args']))
  except NotImplementedError as e:
    _print(line | dict(skipped=str(e)[:80]))
    return
  error = _check(actual, expected, case)
  wall_ms, cpu = [], time.process_time()
  for _ in range(_ITERATIONS.value):
    start = time.perf_counter()
    jax.block_until_ready(f(case['args']))
    wall_ms.append(1e3 * (time.perf_counter() - start))
  cpu_ms = 1e3 * (time.process_time() - cpu) / _ITERATIONS.value
  _print(
    line
    | dict(
      device=jax.devices()[0].device_kind,
      jax=jax.__version__,
      median_ms=round(statistics.median(wall_ms), 4),
      min_ms=round(min(wall_ms), 4),
      cpu_ms=round(cpu_ms, 4),
      relative_rms_error=error,
    )
  )


def _check(actual, expected, case):
  """Largest RMS error over RMS among the float leaves; raises if too large."""
  dtypes = {a.dtype.name for a in jax.tree.leaves(case['args'])}
  tolerance = max(_TOLERANCE[d] for d in dtypes & set(_TOLERANCE))
  rms = lambda x: float(np.sqrt(np.mean(np.square(np.float32(x)))))
  worst = 0.0
  for a, e in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    worst = max(worst, rms(np.float32(a) - np.float32(e)) / max(rms(e), 1e-9))
  if worst > tolerance:
    raise ValueError(f'relative RMS error {worst} is above {tolerance}')
  return worst


def _print(line):
  text = json.dumps(line)
  print(text)
  if _OUTPUT.value:
    with pathlib.Path(_OUTPUT.value).open('a', encoding='utf-8') as f:
      f.write(text + '\n')


if __name__ == '__main__':
  app.run(main)
