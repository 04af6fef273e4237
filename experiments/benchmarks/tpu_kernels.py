r"""Times TPU kernels against upstream's, by the compiler's schedule, no TPU.

python -m experiments.benchmarks.tpu_kernels --rows=attention --chips=v5e,v6e

Compiles every contender of every row of `tpu_rows` with the real TPU compiler
and executes the schedule of its kernels (`pallas_kernels.tpu_compiler`). Prints
a table, keeps one record per row, chip and contender in --output (a second run
does only what is missing; `--redo=ours` drops those first) and draws it.

What the kernels compute is checked by tests/contracts/test_kernels.py.
"""

import json
import math
import pathlib
import sys

from absl import app
from absl import flags
import tqdm

from experiments.benchmarks import tpu_rows
from pallas_kernels import tpu_compiler

_RESULTS = pathlib.Path(__file__).parent / 'results' / 'tpu_kernels.json'
_ROWS = flags.DEFINE_string('rows', '', 'Only rows whose name contains this.')
_CHIPS = flags.DEFINE_list(
  'chips', ['v4', 'v5e', 'v5p', 'v6e', 'tpu7x'], 'Chips to compile for.'
)
_CONTENDERS = flags.DEFINE_string(
  'contenders', '', 'Only contenders whose name contains this.'
)
_REDO = flags.DEFINE_string(
  'redo', None, 'Time the contenders whose name contains this again.'
)
_OUTPUT = flags.DEFINE_string('output', str(_RESULTS), 'Records, JSON.')
_MARKDOWN = flags.DEFINE_bool('markdown', False, 'Print a table of ours only.')
_PICTURE = flags.DEFINE_bool('picture', True, 'Also draw OUTPUT as .png.')

# Beside the MXUs and HBM, whose shares are of time: units by share of slots.
_UNITS = {
  'VALU': 'vector',
  'EUP': 'exp',
  'XLU': 'across\nlanes',
  'VLOAD': 'load',
  'VLOAD:FILL': 'refill',
  'VSTORE': 'store',
  'VSTORE:SPILL': 'spill',
  'VPOP': 'results',
  'SALU': 'scalar',
}
# Some contenders compile for minutes, on a busy machine for many.
_TIMEOUT_S = 3600.0
# A contender may need more VMEM than a small chip has.
_REFUSALS = (
  tpu_compiler.CompileError,
  tpu_compiler.ScheduleError,
  NotImplementedError,
)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  rows = {n: f() for n, f in tpu_rows.ROWS.items() if _ROWS.value in n}
  if not rows:
    raise app.UsageError(
      f'no row contains {_ROWS.value!r}: {"; ".join(tpu_rows.ROWS)}'
    )
  unknown = set(_CHIPS.value) - set(tpu_compiler.CHIPS)
  if unknown:
    raise app.UsageError(
      f'unknown chips {sorted(unknown)}; known: {", ".join(tpu_compiler.CHIPS)}'
    )
  path = pathlib.Path(_OUTPUT.value)
  records = json.loads(path.read_text()) if path.exists() else []
  work = [
    (name, chip, contender)
    for name, row in rows.items()
    for chip in _CHIPS.value
    for contender in row.contenders
    if _CONTENDERS.value in contender
  ]
  if _REDO.value is not None:
    records = [
      r for r in records if _key(r) not in work or _REDO.value not in _key(r)[2]
    ]
  done = set(map(_key, records))
  for key in tqdm.tqdm([w for w in work if w not in done], file=sys.stderr):
    records.append(measure(*key, rows[key[0]]))
    _write(path, records)
  chosen = sorted(
    (r for r in records if _key(r) in set(work)),
    key=lambda r: work.index(_key(r)),
  )
  print(markdown(chosen) if _MARKDOWN.value else table(chosen))
  if _PICTURE.value:
    draw(records, path.with_suffix('.png'))


def measure(name: str, chip: str, contender: str, row: tpu_rows.Row) -> dict:
  """Compiles one contender and times the kernels that do the row's work."""
  record = dict(row=name, chip=chip, contender=contender)
  try:
    fn, args = row.contenders[contender](chip)
    compiled = tpu_compiler.compile_for(
      fn, *args, topology=chip, flags=tpu_rows.FLAGS, timeout_s=_TIMEOUT_S
    )
    kernels = [k for k in compiled.kernels if row.kernels(k)]
    if not kernels:
      raise ValueError(f'{contender}: none of {compiled.kernels} does {name}')
    schedules = [compiled.schedule(k) for k in kernels]
  except _REFUSALS as e:
    return record | dict(refused=' '.join(str(e).split())[:200])
  us = sum(s.microseconds for s in schedules)
  cycles = sum(s.cycles for s in schedules)
  mean = lambda f: sum(f(s) * s.cycles for s in schedules) / cycles
  c = tpu_compiler.CHIPS[chip]
  floor_us = 1e6 * max(
    row.flops / (c.peak_tflops * 1e12),
    row.hbm_bytes / (c.hbm_gb_per_s * 1e9),
  )
  units = sorted(set().union(*(s.slots for s in schedules)))
  return record | dict(
    us=round(us, 2),
    floor_us=round(floor_us, 2),
    bound='FLOPs'
    if row.flops / c.peak_tflops > row.hbm_bytes / c.hbm_gb_per_s * 1e3
    else 'bytes',
    stall=round(sum(s.stall_cycles for s in schedules) / cycles, 4),
    mxu_busy=round(mean(lambda s: s.mxu_busy), 4),
    hbm_busy=round(
      sum(s.bytes for s in schedules) / us / 1e3 / c.hbm_gb_per_s, 4
    ),
    slots={u: round(mean(lambda s: s.slots.get(u, 0.0)), 4) for u in units},
    kernels=kernels,
    versions=compiled.versions,
  )


def table(records: list[dict]) -> str:
  """Microseconds, the share of the floor, and ours over the best other."""
  lines = []
  for name, chip in dict.fromkeys((r['row'], r['chip']) for r in records):
    group = [r for r in records if (r['row'], r['chip']) == (name, chip)]
    timed = [r for r in group if 'us' in r]
    others = [r for r in timed if r['contender'] != 'ours']
    best = min(others, key=lambda r: r['us'], default=None)
    line = f'{name:<42}{chip:<6}'
    for r in timed:
      if r['contender'] == 'ours':
        line += f' ours {r["us"]:>9,.1f} us, {_share(r):5.1%} of the floor'
        if best:
          line += f', {r["us"] / best["us"]:.2f}x'
    if best:
      line += (
        f' of {best["contender"]} {best["us"]:,.1f} us, {_share(best):.1%}'
      )
    lines.append(line)
    lines += [
      f'    {r["contender"]}: {r["refused"]}' for r in group if 'refused' in r
    ]
  return '\n'.join(lines)


def markdown(records: list[dict]) -> str:
  """Ours by row and chip: microseconds, share of the floor, over the best."""
  chips = [c for c in tpu_compiler.CHIPS if c in {r['chip'] for r in records}]
  lines = ['| | ' + ' | '.join(chips) + ' |', '|---' * (len(chips) + 1) + '|']
  for name in dict.fromkeys(r['row'] for r in records):
    cells = []
    for chip in chips:
      key = name, chip
      timed = {
        r['contender']: r
        for r in records
        if (r['row'], r['chip']) == key and 'us' in r
      }
      ours = timed.pop('ours', None)
      cell = f'{ours["us"]:,.0f}, {_share(ours):.0%}' if ours else ''
      if ours and timed:
        best = min(r['us'] for r in timed.values())
        cell += f', {ours["us"] / best:.2f}x'
      cells.append(cell)
    lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def draw(records: list[dict], path: pathlib.Path) -> None:
  """Time over the floor of every contender, and what units ours keeps busy."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  timed = [r for r in records if 'us' in r]
  rows = [name for name in tpu_rows.ROWS if name in {r['row'] for r in timed}]
  units = [u for u in _UNITS if any(u in r['slots'] for r in timed)]
  figure, axes = plt.subplots(
    len(rows), 2, figsize=(13, 2.4 * len(rows)), squeeze=False
  )
  for (left, right), row in zip(axes, rows, strict=True):
    of_row = [r for r in timed if r['row'] == row]
    of_row.sort(key=lambda r: list(tpu_compiler.CHIPS).index(r['chip']))
    _draw_times(left, of_row)
    _draw_slots(right, [r for r in of_row if r['contender'] == 'ours'], units)
    left.set_title(row, fontsize=9, loc='left')
  axes[0][1].set_title('ours: share of slots in use', fontsize=9, loc='left')
  figure.tight_layout()
  figure.savefig(path, dpi=80)
  plt.close(figure)


def _draw_times(axis, records):
  chips = list(dict.fromkeys(r['chip'] for r in records))
  contenders = sorted(
    {r['contender'] for r in records}, key=lambda name: (name != 'ours', name)
  )
  width = 0.8 / len(contenders)
  for i, contender in enumerate(contenders):
    found = {r['chip']: r for r in records if r['contender'] == contender}
    axis.bar(
      [j + i * width for j in range(len(chips))],
      [_ratio(found.get(chip)) for chip in chips],
      width,
      label=contender,
    )
  axis.axhline(1, color='black', linewidth=0.8)
  axis.set_xticks([j + 0.4 - width / 2 for j in range(len(chips))], chips)
  axis.set_ylabel('time / floor', fontsize=8)
  # Beside the bars, which may be of any height.
  axis.legend(
    fontsize=7, loc='upper left', bbox_to_anchor=(1, 1), frameon=False
  )


def _draw_slots(axis, records, units):
  if not records:
    axis.axis('off')
    return
  grid = [
    [r['mxu_busy'], r['hbm_busy'], *(r['slots'].get(u, 0) for u in units)]
    for r in records
  ]
  axis.imshow(grid, vmin=0, vmax=1, cmap='viridis', aspect='auto')
  axis.set_yticks(range(len(records)), [r['chip'] for r in records], fontsize=7)
  names = ['MXU', 'HBM', *(_UNITS[u] for u in units)]
  axis.set_xticks(range(len(names)), names, fontsize=7)
  for i, line in enumerate(grid):
    for j, share in enumerate(line):
      axis.text(
        *(j, i, f'{share:.0%}'),
        **dict(ha='center', va='center', fontsize=7),
        color='white' if share < 0.7 else 'black',
      )


def _key(record):
  return record['row'], record['chip'], record['contender']


def _share(record):
  return record['floor_us'] / record['us']


def _ratio(record):
  return math.nan if record is None else 1 / _share(record)


def _write(path, records):
  lines = ',\n'.join(json.dumps(r) for r in records)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f'[\n{lines}\n]\n')


if __name__ == '__main__':
  app.run(main)
