"""What the GPU benchmark found: a table, a picture, what went wrong."""

from collections.abc import Iterator, Mapping
import pathlib
from typing import Any

_COLUMNS = ('row', 'who', 'us', 'TFLOP/s', 'GB/s', 'tokens/s', 'share', 'ours')
_MOST_WIDTH = 64


def table(content: Mapping[str, Any]) -> str:
  """Text for a terminal.

  Args:
    content: What `gpu_record.Record.read` returns.
  """
  lines = []
  machine = content['machine']
  lines += [f'{name}: {value}' for name, value in machine.items()]
  for name, value in content['peaks'].items():
    lines.append(f'measured {name}: {value:.4g}')
  for name, section in content['sections'].items():
    status, seconds = section.get('status', '?'), section.get('seconds', 0)
    lines += ['', f'## {name}: {status}, {seconds:.0f} s']
    rows = [_cells(row) for row in section.get('rows', [])]
    if rows:
      lines += _aligned([_COLUMNS, *rows])
  wrong = list(problems(content))
  lines += ['', f'{len(wrong)} problems' if wrong else 'no problems']
  return '\n'.join(lines + [f'  {text}' for text in wrong])


def problems(content: Mapping[str, Any]) -> Iterator[str]:
  """What failed: checks, ours where it should have run, whole sections."""
  for name, section in content['sections'].items():
    status = section.get('status', 'done')
    if status.startswith('failed'):
      yield f'{name}: {status}'
    for row in section.get('rows', []):
      # One that was cut off at the end of the time may just be slow.
      if row.get('wrong') and 'started' not in row:
        yield f'{name}: {row["row"]}, {row["contender"]}: {row["error"]}'


def draw(content: Mapping[str, Any], path: pathlib.Path) -> bool:
  """Draws attention's speed, and shares of the floor; whether it could.

  Args:
    content: As for `table`.
    path: Of the picture.
  """
  try:
    import matplotlib.figure
  except ImportError:
    return False
  rows = [
    dict(row, section=name)
    for name, section in content['sections'].items()
    for row in section.get('rows', [])
  ]
  attention = [r for r in rows if r['section'] == 'attention' and 'tflops' in r]
  shares = [
    r for r in rows if 'share' in r and r['contender'].startswith('ours')
  ]
  if not attention and not shares:
    return False
  height = 2 + 0.2 * max(len(attention), len(shares))
  figure = matplotlib.figure.Figure((15, height), layout='constrained')
  speed, share = figure.subplots(1, 2)
  _bars(speed, attention, 'tflops', lambda r: f'{r["row"]}: {r["contender"]}')
  speed.set_xlabel('TFLOP/s')
  _bars(share, shares, 'share', lambda r: f'{r["section"]}: {r["row"]}')
  share.set_xlabel('share of the floor, by measured peaks')
  figure.suptitle(content['machine'].get('device', ''))
  figure.savefig(path)
  return True


def _bars(axis, rows, field, label):
  names = list(dict.fromkeys(map(label, rows)))
  colors = {n: f'C{i}' for i, n in enumerate(_contenders(rows))}
  axis.barh(
    [names.index(label(r)) for r in rows],
    [r[field] for r in rows],
    color=[colors[r['contender']] for r in rows],
  )
  axis.set_yticks(range(len(names)), names, fontsize=7)
  axis.invert_yaxis()


def _contenders(rows):
  return list(dict.fromkeys(r['contender'] for r in rows))


def _cells(row):
  number = lambda name, form: format(row[name], form) if name in row else ''
  note = ''
  if 'best_other_over_ours' in row:
    note = f'{row["best_other_over_ours"]:.2f}x best other'
  for name in ('error', 'skipped'):
    if name in row:
      note = f'{name.upper()}: {row[name]}'
  if 'relative_error' in row and 'us' not in row:
    note = f'relative error {row["relative_error"]:.1e}'
  if 'checked' in row:
    note = 'right, not timed'
  if 'started' in row:
    note = 'cut off: slow, or it hung'
  if 'host_ms_per_step' in row:
    host = row['host_ms_per_step']
    note = f'host {host["p50"]} ms a step, p99 {host["p99"]}, max {host["max"]}'
  if row.get('speedup_over_bfloat16'):
    note += f', {row["speedup_over_bfloat16"]:.2f}x bfloat16'
  if 'host_us' in row:
    note += ', the host may be the limit'
  return (
    row['row'],
    row['contender'],
    number('us', '.1f'),
    number('tflops', '.1f'),
    number('gb_per_s', '.0f'),
    number('tokens_per_s', '.0f'),
    number('share', '.1%'),
    note.strip(', '),
  )


def _aligned(rows):
  # The last column may be as wide as it likes.
  widths = [
    min(max(len(row[i]) for row in rows), _MOST_WIDTH)
    for i in range(len(_COLUMNS) - 1)
  ]
  return [
    '  '.join(
      [cell.ljust(w) for cell, w in zip(row, widths, strict=False)] + [row[-1]]
    ).rstrip()
    for row in rows
  ]
