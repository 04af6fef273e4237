"""Contenders of a row take turns on one device; medians of device time.

A time is that of many calls that are enqueued one after another and waited for
once, by how many they are: the device is never idle between two of them unless
the host is slower than the device, which is reported. Calls rotate over sets of
arguments, so that what one call leaves in the L2 cache is not what the next one
reads. PyTorch's calls are timed by CUDA events around them.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import statistics
import time
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.gpu_record import Section

# Seconds that one contender computes in one turn.
_TURN_S = 0.02
_MAX_RUNS = 500
_ROUNDS = 7
_MIN_ROUNDS = 3
# So few runs that no queue is full: the host is as fast as it can be.
_BURST, _SLOW_S = 8, 5e-3
# Of the device's time: beyond, the host's may be what was measured.
_HOST_SHARE = 0.8


class Timed(Protocol):
  """What can be checked, and timed."""

  def result(self) -> Any:
    """Of the first set of arguments: a pytree that NumPy can read."""

  def seconds(self, runs: int) -> tuple[float, float]:
    """Of one call: on the device, and for the host to enqueue it."""


class JaxCalls:
  """A function of JAX.

  Args:
    fn: Of arrays, traceable.
    *sets: Arguments of each call of a run. A run is one program, so that the
      host enqueues many calls at once.
  """

  def __init__(self, fn: Callable[..., Any], *sets: Sequence[Any]):
    self._sets = sets
    one = jax.jit(fn)
    self._run = jax.jit(lambda *sets: [one(*args) for args in sets])

  def result(self) -> Any:
    """See `Timed`."""
    return jax.block_until_ready(self._run(*self._sets))[0]

  def seconds(self, runs: int) -> tuple[float, float]:
    """See `Timed`."""
    start = time.perf_counter()
    for _ in range(runs):
      out = self._run(*self._sets)
    enqueued = time.perf_counter()
    jax.block_until_ready(out)
    calls = runs * len(self._sets)
    return (time.perf_counter() - start) / calls, (enqueued - start) / calls


@dataclasses.dataclass(frozen=True)
class Contender:
  """One way to do the work of a row.

  Attributes:
    build: Makes it; may raise `NotImplementedError`, for what it declines.
    check: Its result to an error that is to be at most `tolerance`.
    tolerance: See above; relative RMS, in most rows.
    is_ours: Whether its failure is that of the benchmark.
  """

  build: Callable[[], Timed]
  check: Callable[[Any], float]
  tolerance: float
  is_ours: bool = False


def compare(
  section: Section,
  row: str,
  contenders: Mapping[str, Contender],
  figures: Callable[[float], Mapping[str, Any]],
) -> None:
  """Checks the contenders, times those that are right, and adds their rows.

  Args:
    section: Where rows go; what it has already is not done again.
    row: Name of the work.
    contenders: By name.
    figures: Microseconds to what the row says of them.
  """
  ready, errors = {}, {}
  for name, contender in contenders.items():
    if section.has(row, name):
      continue
    if not section.can_start:
      section.add(row, name, skipped='no time is left')
      continue
    with section.trying(row, name, is_ours=contender.is_ours):
      timed = contender.build()
      error = contender.check(timed.result())
      # So that NaN is wrong.
      if not error <= contender.tolerance:
        section.add(
          row,
          name,
          error=f'relative error {error:.3g} > {contender.tolerance:.3g}',
          wrong=True,
        )
        continue
      ready[name], errors[name] = timed, error
  times = measure(section, row, ready, contenders)
  others = [t['us'] for n, t in times.items() if not contenders[n].is_ours]
  for name, found in times.items():
    if contenders[name].is_ours and others:
      found = found | dict(best_other_over_ours=min(others) / found['us'])
    more = dict(relative_error=errors[name]) | dict(figures(found['us']))
    section.add(row, name, **_rounded(found | more))


def measure(
  section: Section,
  row: str,
  ready: Mapping[str, Timed],
  contenders: Mapping[str, Contender],
) -> dict[str, dict[str, float]]:
  """Times contenders by turns: 'us', 'scatter', 'rounds' of each.

  One that raises now is dropped, with a row that says so.
  """
  trying = lambda name: section.trying(
    row, name, is_ours=contenders[name].is_ours
  )
  times = {name: [] for name in ready}
  host, runs = {}, {}
  for name, timed in ready.items():
    with trying(name):
      # The first call after another contender's finds cold caches.
      first, _ = timed.seconds(1)
      one, host[name] = timed.seconds(_BURST if first < _SLOW_S else 1)
      runs[name] = min(max(round(_TURN_S / max(one, 1e-9)), 1), _MAX_RUNS)
  for i in range(_ROUNDS):
    if i >= _MIN_ROUNDS and section.left_s < 0:
      break
    # Whoever goes first in one round goes last in the next.
    for name in list(runs) if i % 2 else list(runs)[::-1]:
      with trying(name):
        times[name].append(1e6 * ready[name].seconds(runs[name])[0])
        continue
      runs.pop(name)
  found = {}
  for name in runs:
    median = statistics.median(times[name])
    found[name] = dict(
      us=median,
      scatter=(max(times[name]) - min(times[name])) / median,
      rounds=len(times[name]),
    )
    if 1e6 * host[name] > _HOST_SHARE * median:
      found[name]['host_us'] = 1e6 * host[name]
  return found


def as_numpy(x: Any) -> np.ndarray:
  """An array of JAX, NumPy or PyTorch in float32."""
  if hasattr(x, 'detach'):
    x = x.detach().float().cpu().numpy()
  return np.asarray(x).astype(np.float32)


def relative_error(actual: Any, expected: Any) -> float:
  """RMS of the difference over that of `expected`, of the worst leaf."""
  worst = 0.0
  pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
  for a, e in pairs:
    if not isinstance(a, jax.Array) or not isinstance(e, jax.Array):
      a, e = as_numpy(a), as_numpy(e)
    if a.shape != e.shape:
      raise ValueError(f'a result of shape {a.shape}, not {e.shape}')
    error, size = map(float, _rms_of_difference(a, e))
    if not np.isfinite(error):
      return float('nan')
    worst = max(worst, error / max(size, 1e-30))
  return worst


@jax.jit
def _rms_of_difference(a, e):
  """That, and the RMS of `e`; on the device, for arrays may be large."""
  a, e = a.astype(jnp.float32), e.astype(jnp.float32)
  rms = lambda x: jnp.sqrt(jnp.mean(jnp.square(x)))
  return rms(a - e), rms(e)


def _rounded(fields):
  shorten = lambda x: float(f'{x:.5g}') if isinstance(x, float) else x
  return {name: shorten(value) for name, value in fields.items()}
