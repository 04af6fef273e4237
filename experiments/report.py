"""A run on one page: a self-contained HTML file with pictures.

Pictures are inline SVG on a transparent ground, so that the file needs nothing
beside it and reads in light and dark, on a phone as on paper.
"""

import base64
from collections.abc import Mapping, Sequence
import html
import io
import math
import numbers
import os
import pathlib
import re
from typing import Any

import matplotlib
from matplotlib import axes
from matplotlib import figure
from matplotlib import ticker

from jaxtrain import goodput as goodput_lib

# Mid tones that stand out from white and from near black.
_COLORS = ('#2f7ed8', '#e8710a', '#1e9e5a', '#a453c0')
_INK = '#8a8f98'
# Of `goodput.CATEGORIES`, about in the order in which they come: green is good.
_TIME_COLORS = dict(
  start='#4fb3bf',
  restart='#b5651d',
  compile='#c9a227',
  lost='#d64545',
  step='#1e9e5a',
  data='#e8710a',
  evaluation='#a453c0',
  checkpoint='#2f7ed8',
  other=_INK,
)
_CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --ground: #fff;
  --soft: #f3f4f6; --line: #d8dbe0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb;
  --ground: #15181c; --soft: #20242a; --line: #3a4048; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--ground); max-width: 46rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35rem .5rem; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
td { text-align: right; font-variant-numeric: tabular-nums; }
th { font-weight: 500; }
figure { margin: 0; } img { width: 100%; height: auto; }
figcaption { font-size: .875rem; opacity: .75; }
pre { background: var(--soft); padding: .75rem; border-radius: .4rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
pre b { font-weight: 600; } pre span { opacity: .7; }
"""
# What HTML forbids in text: controls, surrogates.
_FORBIDDEN = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]')


def write_report(
  path: str | os.PathLike,
  *,
  title: str,
  summary_rows: Sequence[tuple[str, Any]],
  loss_curve: Mapping[str, Sequence[tuple[int, float]]],
  kv_pages_over_time: Sequence[tuple[float, int, int]],
  page_size: int,
  completions: Sequence[tuple[str, str]],
  notes: str = '',
  goodput: goodput_lib.Record | None = None,
) -> pathlib.Path:
  """Writes the page; a file that exists is replaced only when all is well.

  Args:
    path: Where to; folders are made.
    title: Heading.
    summary_rows: (what, value) of the table.
    loss_curve: Series name, 'train' or 'held-out', -> (step, nats per token).
    kv_pages_over_time: (seconds, pages in use, tokens held) of every step.
    page_size: Tokens of one page.
    completions: (prompt, text that the model made of it).
    notes: A paragraph under the heading.
    goodput: Where the time of the training went.

  Returns:
    `path`.
  """
  path = pathlib.Path(path)
  body = [f'<h1>{_text(title)}</h1>']
  if notes:
    body.append(f'<p>{_text(notes)}</p>')
  body += ['<h2>Summary</h2>', _table(summary_rows)]
  if any(loss_curve.values()):
    body += [
      '<h2>Loss</h2>',
      _picture(
        loss_figure(loss_curve), 'Loss by step', 'Cross-entropy, nats per token'
      ),
    ]
  if goodput is not None and goodput.incarnations:
    body += _goodput_section(goodput)
  if kv_pages_over_time:
    body += [
      '<h2>KV cache</h2>',
      _picture(
        kv_figure(kv_pages_over_time, page_size),
        'KV pages in use over time',
        f'Slots of the pages in use ({page_size} tokens a page), and tokens in '
        'them; the gap is waste',
      ),
    ]
  if completions:
    body.append('<h2>Completions</h2>')
    body += [
      f'<pre><span>{_text(prompt)}</span><b>{_text(text)}</b></pre>'
      for prompt, text in completions
    ]
  page = (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{_text(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n'
    + '\n'.join(body)
    + '\n</body>\n</html>\n'
  )
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_name(path.name + '.tmp')
  unfinished.write_text(page, encoding='utf-8')
  unfinished.replace(path)
  return path


def loss_figure(
  loss_curve: Mapping[str, Sequence[tuple[int, float]]],
) -> figure.Figure:
  """Loss by step, one line per series; a series of few points gets dots."""
  fig, ax = _axes('step', 'loss')
  for color, (name, points) in zip(
    _cycle(len(loss_curve)), loss_curve.items(), strict=True
  ):
    if points:
      steps, losses = zip(*points, strict=True)
      few = len(points) <= 30
      ax.plot(
        steps, losses, color=color, label=name, marker='o' if few else None,
        markersize=4, linewidth=1.6,
      )  # fmt: skip
  ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  _legend(ax)
  return fig


def kv_figure(
  kv_pages_over_time: Sequence[tuple[float, int, int]], page_size: int
) -> figure.Figure:
  """Slots of the pages in use, and the tokens in them, over seconds."""
  fig, ax = _axes('seconds', 'tokens')
  seconds, pages, held = zip(*kv_pages_over_time, strict=True)
  slots = [n * page_size for n in pages]
  ax.fill_between(
    seconds, held, slots, step='post', color=_COLORS[1], alpha=0.3, linewidth=0
  )
  ax.step(seconds, slots, where='post', color=_COLORS[1], label='slots in use')
  ax.step(seconds, held, where='post', color=_COLORS[0], label='tokens held')
  ax.set_ylim(bottom=0)
  _legend(ax)
  return fig


def goodput_figure(record: goodput_lib.Record) -> figure.Figure:
  """Time of a run: a bar for each incarnation, from where the last one ended.

  Within a bar the categories are stacked, not in the order of time.
  """
  count = len(record.incarnations)
  fig, ax = _axes('seconds since the run began', 'incarnation')
  fig.set_size_inches(6.4, 1.4 + 0.35 * min(count, 12))
  draw_goodput(ax, record)
  if ax.get_legend_handles_labels()[0]:
    fig.legend(
      frameon=False, labelcolor=_INK, loc='outside upper center', ncols=5
    )
  return fig


def draw_goodput(ax: axes.Axes, record: goodput_lib.Record) -> None:
  """The bars of `goodput_figure` on given axes, labelled for a legend."""
  left, labelled = 0.0, set()
  for row, incarnation in enumerate(record.incarnations, 1):
    for category, color in _TIME_COLORS.items():
      seconds = incarnation.seconds.get(category, 0.0)
      if seconds > 0:
        label = None if category in labelled else category
        ax.barh(row, seconds, left=left, height=0.7, color=color, label=label)
        labelled.add(category)
        left += seconds
  # One bar has only one place to name.
  ax.yaxis.set_major_locator(
    ticker.MaxNLocator(integer=True, nbins=6, min_n_ticks=1)
  )
  ax.set_ylim(len(record.incarnations) + 0.6, 0.4)
  ax.grid(axis='y', visible=False)


def _goodput_section(record):
  seconds, parts = record.seconds, record.fractions
  return [
    '<h2>Goodput</h2>',
    _picture(
      goodput_figure(record),
      'Time of the run by category',
      f'{100 * parts["step"]:.1f} % of {sum(seconds.values()):.0f} s are steps '
      f'made for the first time, in {len(record.incarnations)} incarnation(s)',
    ),
    _table(
      [
        (f'{name}, s', f'{seconds[name]:.2f} ({100 * parts[name]:.1f} %)')
        for name in goodput_lib.CATEGORIES
        if seconds[name] > 0
      ]
    ),
  ]


def svg(fig: figure.Figure) -> str:
  """The figure as an SVG document, the same for the same data."""
  out = io.StringIO()
  style = {'svg.fonttype': 'none', 'svg.hashsalt': 'onemesh'}
  with matplotlib.rc_context(style):
    fig.savefig(out, format='svg', transparent=True, metadata={'Date': None})
  return out.getvalue()


def text_table(rows: Sequence[tuple[str, Any]]) -> str:
  """The summary for a terminal, one row a line."""
  cells = [(str(name), _value(value)) for name, value in rows]
  left = max((len(name) for name, _ in cells), default=0)
  right = max((len(value) for _, value in cells), default=0)
  return '\n'.join(f'{n:<{left}}  {v:>{right}}' for n, v in cells)


def _axes(xlabel, ylabel):
  fig = figure.Figure(figsize=(6.4, 3.4), layout='constrained')
  ax = fig.add_subplot()
  ax.set_xlabel(xlabel, color=_INK)
  ax.set_ylabel(ylabel, color=_INK)
  ax.tick_params(colors=_INK)
  ax.grid(color=_INK, alpha=0.25, linewidth=0.6)
  ax.spines[['top', 'right']].set_visible(False)
  ax.spines[['left', 'bottom']].set_color(_INK)
  return fig, ax


def _cycle(n):
  return [_COLORS[i % len(_COLORS)] for i in range(n)]


def _legend(ax):
  if ax.get_legend_handles_labels()[0]:
    ax.legend(frameon=False, labelcolor=_INK)


def _picture(fig, alt, caption):
  data = base64.b64encode(svg(fig).encode()).decode()
  return (
    f'<figure><img alt="{_text(alt)}" src="data:image/svg+xml;base64,{data}">'
    f'<figcaption>{_text(caption)}</figcaption></figure>'
  )


def _table(rows):
  lines = [
    f'<tr><th scope="row">{_text(name)}</th>'
    f'<td>{_text(_value(value))}</td></tr>'
    for name, value in rows
  ]
  return '\n'.join(['<table>', *lines, '</table>'])


def _value(value):
  """Four digits of a float, thousands grouped; anything else as it is."""
  if isinstance(value, bool) or not isinstance(value, numbers.Real):
    return str(value)
  if isinstance(value, numbers.Integral) or not math.isfinite(value):
    return f'{value:,}'
  return f'{value:,.0f}' if abs(value) >= 10_000 else f'{value:.4g}'


def _text(value):
  return html.escape(_FORBIDDEN.sub('\ufffd', str(value)))
