r"""Finds block sizes for GPU kernels, by timing them on this machine's GPU.

python -m experiments.benchmarks.tune_gpu --budget_s=100
python -m experiments.benchmarks.tune_gpu --dry_run --rows='attention 4096'

Each candidate of our kernel of a row of `tune_gpu_rows` is compared with XLA's
implementation in float32, then timed; the fastest few are timed once more, by
turns. The best so far goes into the `tuned.json` beside the kernel at once,
under the name that the kernel looks up. Candidates are tried in random order
and a row gets a quarter of the time at most: where that is not enough, what it
has is a fair sample. A second run goes on with what is missing, and does not
try again what did not compile, was wrong, hung or killed its process.

`--dry_run` needs no GPU: it compiles each candidate for one
(`pallas_kernels.gpu_compiler`) and says what ptxas does: registers, spills,
warnings, and the share of the time that the tensor cores could be busy in the
main loop. A run with `--compiled` leaves out what did not compile then, and
tries what spills or is serialised last.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import importlib
import json
import pathlib
import random
import statistics
import sys
from typing import Any

import jax

from experiments.benchmarks import tune_gpu_rows
from experiments.benchmarks import tuned_json
from experiments.benchmarks.gpu_record import Record
from experiments.benchmarks.gpu_record import Section
from experiments.benchmarks.gpu_timing import JaxCalls
from experiments.benchmarks.gpu_timing import Timed
from experiments.benchmarks.gpu_timing import relative_error
from experiments.benchmarks.tune_gpu_rows import Row
from pallas_kernels import gpu_compiler
from pallas_kernels.common import dispatch
from pallas_kernels.common import hopper
from pallas_kernels.common import tuned

_RESULTS = pathlib.Path(__file__).parent / 'results'
# Of a row's candidates: how many are timed by turns in the end, and how often.
_FINALISTS, _ROUNDS = 3, 5
# Of the time that is left, how much one row may take.
_ROW_SHARE = 0.25
# Seconds that one measurement is to take.
_TURN_S = 0.01
_MAX_RUNS = 200

# Of how a candidate is timed: (a function, its arguments) to what times it.
Timer = Callable[[Callable[..., Any], tuple[Any, ...]], Timed]


@dataclasses.dataclass(frozen=True)
class Target:
  """Where the best configuration of a row goes.

  Attributes:
    path: Of the op's `tuned.json`.
    function: That the kernel looks up.
    features: Of the row's input.
    candidates: To try.
  """

  path: pathlib.Path
  function: str
  features: dict[str, Any]
  candidates: list[dict[str, Any]]


def find_target(row: Row, implementation: str, chip: str) -> Target:
  """Asks the kernel's module what to try, and the kernel what it looks up.

  Args:
    row: The work.
    implementation: Module of the op.
    chip: For its candidates.

  Raises:
    NotImplementedError: There is no such kernel, it declines, or nothing of it
      can be chosen.
  """
  kernel = dispatch.load(row.op, implementation, row.function)
  # A backward pass may be a file of its own, beside the backend's.
  backend = importlib.import_module(f'pallas_kernels.{row.op}.{implementation}')
  own = importlib.import_module(kernel.__module__)
  prefix = 'backward_' if row.function.endswith('_backward') else ''
  name = f'{prefix}candidates'
  propose = getattr(backend, name, None) or getattr(own, name, None)
  if propose is None:
    raise NotImplementedError(f'{own.__name__} has no {name}')
  args = _shapes(row)
  candidates = list(propose(chip, *args, **row.static))
  if not candidates:
    raise NotImplementedError(f'{own.__name__} proposes nothing')
  asked = [
    _questions(kernel, row, args, config) for config in (None, candidates[0])
  ]
  # A pass may call other kernels, which look up their own.
  found = [q for q in asked[0] if q not in asked[1]]
  if len(found) != 1:
    raise NotImplementedError(
      f'{row.function} looks up {[q.function for q in found]} for one config'
    )
  path = pathlib.Path(backend.__file__).parent / 'tuned.json'
  return Target(path, found[0].function, found[0].features, candidates)


def _shapes(row):
  return jax.eval_shape(row.make, jax.random.key(0))


def _questions(kernel, row, args, config):
  call = functools.partial(kernel, **row.static, config=config)
  with tuned.questions() as asked:
    # Another function each time, which JAX has not traced.
    jax.eval_shape(lambda *args: call(*args), *args)
  return asked


def tune(
  section: Section,
  name: str,
  row: Row,
  chip: str,
  *,
  redo: bool = False,
  timer: Timer = JaxCalls,
  order: Callable[[str, Sequence[dict]], list[dict]] | None = None,
  share: float = _ROW_SHARE,
) -> None:
  """Times the candidates of one row and keeps the best, as far as time allows.

  Args:
    section: Where what was found of each candidate goes.
    name: Of the row.
    row: The work.
    chip: Whose entry to write.
    redo: Also if there is an entry.
    timer: How a candidate is timed.
    order: Name of the row and candidates to those to try, in order; `None` is
      all of them, shuffled.
    share: Of the time that is left, how much this row may take.
  """
  try:
    target = find_target(row, section.implementation, chip)
  except NotImplementedError as e:
    section.add(name, 'all', skipped=str(e)[:300])
    return
  known = tuned_json.find(target.path, target.function, chip, target.features)
  if known is not None and not known.get('incomplete') and not redo:
    section.add(name, 'all', skipped='tuned already')
    return
  candidates = (order or shuffled)(name, target.candidates)
  trial = _Trial(section, name, row, timer, share)
  best = None
  for config in candidates:
    us = trial.us_of(config)
    if us is not None and (best is None or us < best[0]):
      best = us, config
      _keep(target, chip, *best, incomplete=True)
  results = [section.find(name, json.dumps(c)) or {} for c in candidates]
  is_complete = not any('skipped' in r or not r for r in results)
  if best is not None:
    best = trial.final(candidates) or best
    _keep(target, chip, *best, incomplete=not is_complete)
  count = lambda field: sum(field in r for r in results)
  section.add(
    name,
    'all',
    **(dict(us=best[0], config=best[1]) if best else dict(skipped='none')),
    candidates=len(target.candidates),
    timed=count('us'),
    failed=count('error'),
    untried=count('skipped') + results.count({}),
  )


def _keep(target, chip, us, config, *, incomplete):
  entry = dict(
    chip=chip, features=target.features, config=config, us=round(us, 2)
  )
  # So that another run looks further.
  entry |= dict(incomplete=True) if incomplete else {}
  tuned_json.keep(target.path, target.function, entry)


class _Trial:
  """Checks and times candidates of one row; arrays are made when needed."""

  def __init__(self, section, name, row, timer, share):
    self._section, self._name, self._row = section, name, row
    self._timer = timer
    self._reserved_s = (1 - share) * section.left_s
    self._calls = {}

  @property
  def _left_s(self):
    return self._section.left_s - self._reserved_s

  @functools.cached_property
  def _args(self):
    return jax.jit(self._row.make)(jax.random.key(0))

  @functools.cached_property
  def _expected(self):
    return jax.block_until_ready(self._row.expected(self._args))

  def us_of(self, config):
    """Microseconds, known or found; `None` if it can't be had."""
    section, who = self._section, json.dumps(config)
    if section.has(self._name, who):
      known = section.find(self._name, who)
      if 'skipped' not in known:
        return known.get('us')
    if self._left_s < 0 or not section.can_start:
      section.add(self._name, who, skipped='no time is left')
      return None
    with section.trying(self._name, who, is_ours=False):
      calls = self._timed(config)
      error = relative_error(calls.result(), self._expected)
      if not error <= self._row.tolerance:
        raise ValueError(f'relative error {error:.3g}')
      us = self._measure(calls)
      section.add(self._name, who, us=round(us, 2), relative_error=error)
      return us
    return None

  def final(self, candidates):
    """The best of the fastest few, by turns; `None` if there is no time."""
    timed = {}
    for config in candidates:
      known = self._section.find(self._name, json.dumps(config)) or {}
      if 'us' in known:
        timed[json.dumps(config)] = known['us']
    finalists = sorted(timed, key=timed.get)[:_FINALISTS]
    times = {who: [] for who in finalists}
    if len(finalists) < 2:
      return None
    for _ in range(_ROUNDS):
      if self._left_s < 0:
        return None
      for who in finalists:
        with self._section.trying(self._name, 'final', is_ours=False):
          times[who].append(self._measure(self._timed(json.loads(who))))
          continue
        # It has stopped working: its first time is not to be trusted.
        return None
    medians = {who: statistics.median(found) for who, found in times.items()}
    who = min(medians, key=medians.get)
    self._section.add(self._name, 'final', us=medians[who], candidate=who)
    return medians[who], json.loads(who)

  def _timed(self, config):
    who = json.dumps(config)
    if who not in self._calls:
      row = self._row
      implementation = self._section.implementation
      f = dispatch.load(row.op, implementation, row.function)
      f = functools.partial(f, **row.static, config=config)
      self._calls[who] = self._timer(f, self._args)
    return self._calls[who]

  def _measure(self, calls):
    calls.seconds(1)
    one, _ = calls.seconds(2)
    runs = min(max(round(_TURN_S / max(one, 1e-9)), 1), _MAX_RUNS)
    return 1e6 * statistics.median(calls.seconds(runs)[0] for _ in range(3))


def dry_run(
  section: Section, name: str, row: Row, chip: str, most: int | None = None
) -> None:
  """Compiles the candidates of one row for a GPU that is not there.

  Args:
    section: Where what the compiler says of each candidate goes.
    name: Of the row.
    row: The work.
    chip: One of `gpu_compiler.CHIPS`.
    most: Candidates to compile, the first ones; `None` is all.
  """
  try:
    target = find_target(row, section.implementation, chip)
  except NotImplementedError as e:
    section.add(name, 'all', skipped=str(e)[:300])
    return
  kernel = dispatch.load(row.op, section.implementation, row.function)
  args = _shapes(row)
  for config in target.candidates[:most]:
    who = json.dumps(config)
    if section.has(name, who) and 'skipped' not in section.find(name, who):
      continue
    if section.left_s < 0:
      section.add(name, who, skipped='no time is left')
      continue
    with section.trying(name, who, is_ours=False, hang_s=600.0):
      f = functools.partial(kernel, **row.static, config=config)
      compiled = gpu_compiler.compile_for(f, *args, chip=chip)
      kernels = [_describe(k) for k in compiled.kernels]
      if not kernels:
        raise ValueError('there is no kernel in the program')
      section.add(name, who, kernels=kernels)


def _describe(kernel: gpu_compiler.Kernel) -> dict[str, Any]:
  found = dict(
    name=kernel.name,
    registers=kernel.registers,
    spill_bytes=kernel.spill_bytes,
    warnings=list(kernel.warnings),
  )
  if kernel.loops:
    found['tensor_share'] = round(kernel.main_loop.tensor_share, 3)
  return found


def dry_table(section: Section, rows: Mapping[str, Row]) -> str:
  """What `dry_run` has found, a line for each kernel of a candidate."""
  lines = []
  for known in section.rows():
    if known['row'] not in rows:
      continue
    lead = f'{known["row"]}  {known["contender"]}'
    if 'error' in known:
      lines.append(f'{lead}  {known["error"]}')
    for k in known.get('kernels', ()):
      share = f'{k["tensor_share"]:.0%}' if 'tensor_share' in k else '-'
      lines.append(
        f'{lead}  {k["name"]}: {k["registers"]} registers, '
        f'{k["spill_bytes"]} bytes spilled, {len(k["warnings"])} warnings, '
        f'tensor cores {share}' + ''.join(f'\n    {w}' for w in k['warnings'])
      )
  return '\n'.join(lines)


def shuffled(name: str, candidates: Sequence[dict]) -> list[dict]:
  """The candidates of a row in an order that is the same in every run."""
  return random.Random(name).sample(list(candidates), len(candidates))


def by_compiled(
  rows: Sequence[Mapping[str, Any]], name: str, candidates: Sequence[dict]
) -> list[dict]:
  """Without what does not compile, and with what spills at the end.

  Args:
    rows: That `dry_run` has found; candidates that are not there stay.
    name: Of the row.
    candidates: Of the row.
  """
  known = {r['contender']: r for r in rows if r['row'] == name}

  def is_slow(config):
    kernels = known.get(json.dumps(config), {}).get('kernels', ())
    return any(k['spill_bytes'] or k['warnings'] for k in kernels)

  compiled = [
    c for c in candidates if 'error' not in known.get(json.dumps(c), {})
  ]
  return sorted(shuffled(name, compiled), key=is_slow)


def main(argv: list[str]) -> int:
  """Tunes, or compiles."""
  args = _parser().parse_args(argv)
  every = tune_gpu_rows.ROWS | tune_gpu_rows.TINY
  names = [n for n in tune_gpu_rows.ROWS if args.rows in n] or [
    n for n in every if args.rows in n
  ]
  if not names:
    print(f'no row contains {args.rows!r}: {"; ".join(every)}')
    return 2
  path = pathlib.Path(args.out) / f'gpu_{args.name}.json'
  section = Section(
    Record(path),
    'dry_run' if args.dry_run else 'tune',
    budget_s=args.budget_s,
    hang_s=max(30.0, 0.3 * args.budget_s),
    implementation=args.implementation,
  )
  rows = {name: every[name] for name in names}
  if args.dry_run:
    for name, row in rows.items():
      dry_run(section, name, row, args.chip, args.most)
    print(dry_table(section, rows))
    return 0
  order = None
  if args.compiled:
    compiled = Record(pathlib.Path(args.compiled)).rows('dry_run')
    order = functools.partial(by_compiled, compiled)
  try:
    chip = hopper.current().name
  except NotImplementedError as e:
    print(e)
    return 2
  for name, row in rows.items():
    share = 1.0 if len(rows) == 1 else _ROW_SHARE
    tune(section, name, row, chip, redo=args.redo, order=order, share=share)
  return 0


def _parser():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--rows', default='', help='Only rows whose name contains this.')
  add('--budget_s', type=float, default=300.0, help='Seconds to work for.')
  add('--out', default=str(_RESULTS), help='Folder of the record.')
  add('--name', default='h200', help='The record is OUT/gpu_NAME.json.')
  add('--redo', action='store_true', help='Also what tuned.json has already.')
  add('--dry_run', action='store_true', help='Compile, without a GPU.')
  add(
    '--chip', default='h200', choices=gpu_compiler.CHIPS, help='Dry run: for.'
  )
  add('--most', type=int, help='Dry run: of each row, so many candidates.')
  add('--compiled', help='Record of a dry run: what to leave out.')
  add('--implementation', default='pallas_gpu', help='Module of the ops.')
  return parser


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
