"""The report is one well-formed file, whatever the model wrote."""

import base64
from html import parser
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from experiments import report
from jaxtrain import goodput

_SVG = '{http://www.w3.org/2000/svg}'
_VOID = {'meta', 'img'}


class _Page(parser.HTMLParser):
  """Checks that tags nest, and collects text and pictures."""

  def __init__(self, text):
    super().__init__(convert_charrefs=True)
    self.open, self.seen, self.pictures, self.texts = [], [], [], []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.seen.append(tag)
    if tag == 'img':
      self.pictures.append(dict(attrs)['src'])
    if tag not in _VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if 'style' not in self.open:
      self.texts.append(data)


def _write(path, **changes):
  given = dict(
    title='A run',
    summary_rows=[('final loss', 1.23456), ('tokens', 1234567)],
    loss_curve={'train': [(i, 5 / (i + 1)) for i in range(50)]},
    kv_pages_over_time=[(0.0, 1, 3), (0.5, 4, 60), (1.0, 2, 20)],
    page_size=16,
    completions=[('Once', ' upon a time')],
  )
  report.write_report(path, **given | changes)
  return path.read_text(encoding='utf-8')


def _svgs(page):
  roots = []
  for source in page.pictures:
    kind, data = source.split(',', 1)
    assert kind == 'data:image/svg+xml;base64'
    root = ET.fromstring(base64.b64decode(data, validate=True))
    assert root.tag == f'{_SVG}svg'
    roots.append(root)
  return roots


def test_page_has_everything(tmp_path):
  text = _write(
    tmp_path / 'a' / 'b' / 'report.html',
    loss_curve={
      'train': [(i, 5 / (i + 1)) for i in range(50)],
      'held-out': [(0, 5.0), (49, 0.2)],
    },
    notes='2x2x2 mesh',
  )
  page = _Page(text)
  for wanted in ('A run', '2x2x2 mesh', '1.235', '1,234,567', ' upon a time'):
    assert wanted in page.texts
  assert page.seen.count('tr') == 2
  loss, kv = _svgs(page)
  words = lambda root: {e.text for e in root.iter(f'{_SVG}text')}
  assert {'train', 'held-out', 'step', 'loss'} <= words(loss)
  assert {'slots in use', 'tokens held', 'seconds'} <= words(kv)
  assert [p.name for p in (tmp_path / 'a' / 'b').iterdir()] == ['report.html']


def test_nothing_is_fetched(tmp_path):
  text = _write(tmp_path / 'report.html')
  outside = text.replace('data:image/svg+xml', '')
  assert 'http' not in outside and 'src="/' not in outside


@pytest.mark.parametrize(
  'nasty',
  [
    '<script>alert(1)</script>',
    '</pre></body>"\'&amp;<img src=x onerror=alert(1)>',
    'bell\x07 null\x00 escape\x1b half\ud800 \x85',
    'Zürich 東京 \U0001f600\n\ttab',
  ],
)
def test_model_text_is_only_text(tmp_path, nasty):
  text = _write(
    tmp_path / 'report.html',
    title=nasty,
    notes=nasty,
    summary_rows=[(nasty, nasty)],
    completions=[(nasty, nasty)],
  )
  page = _Page(text)
  assert 'script' not in page.seen
  assert page.seen.count('img') == 2 and page.seen.count('pre') == 1
  shown = report._FORBIDDEN.sub('\ufffd', nasty)
  # Twice each but for the notes: title, row, completion.
  assert page.texts.count(shown) == 7


def test_pictures_show_the_data():
  (line,) = report.loss_figure({'train': [(1, 3.0), (2, 1.5)]}).axes[0].lines
  np.testing.assert_array_equal(line.get_xydata(), [(1, 3.0), (2, 1.5)])
  slots, held = report.kv_figure([(0.0, 1, 3), (2.0, 4, 60)], 16).axes[0].lines
  np.testing.assert_array_equal(slots.get_xydata(), [(0, 16), (2, 64)])
  np.testing.assert_array_equal(held.get_xydata(), [(0, 3), (2, 60)])


def test_pictures_are_deterministic():
  points = {'train': [(1, 3.0), (2, math.nan), (3, 1.0)]}
  once, again = (report.svg(report.loss_figure(points)) for _ in range(2))
  assert once == again


def test_empty_parts_are_left_out(tmp_path):
  page = _Page(
    _write(
      tmp_path / 'report.html',
      summary_rows=[],
      loss_curve={'train': []},
      kv_pages_over_time=[],
      completions=[],
    )
  )
  assert not page.pictures and 'h2' in page.seen and 'pre' not in page.seen


def test_failed_write_keeps_the_old_report(tmp_path):
  path = tmp_path / 'report.html'
  before = _write(path)
  with pytest.raises(ValueError):
    _write(path, kv_pages_over_time=[(0.0, 1)])
  assert path.read_text(encoding='utf-8') == before
  assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
  'value, shown',
  [
    (1.23456, '1.235'),
    (123456.7, '123,457'),
    (0.00012345, '0.0001234'),
    (np.float32(2.5), '2.5'),
    (np.int64(4000), '4,000'),
    (7, '7'),
    (12345, '12,345'),
    (math.nan, 'nan'),
    (True, 'True'),
    ('x', 'x'),
  ],
)
def test_text_table(value, shown):
  table = report.text_table([('loss', value), ('something longer', 'ab')])
  first, second = table.splitlines()
  assert first.split() == ['loss', shown] and len(first) == len(second)


def _record(*runs):
  time_s, made = 0.0, []
  for seconds in runs:
    end = time_s + sum(seconds.values())
    made.append(goodput.Incarnation(time_s, end, 0, 9, 0, seconds, None))
    time_s = end
  return goodput.Record(tuple(made))


def test_goodput_is_a_picture_and_a_table(tmp_path):
  record = _record(dict(start=2.0, step=5.0), dict(restart=1.0, step=2.0))
  page = _Page(_write(tmp_path / 'a.html', goodput=record))
  text = ' '.join(page.texts)
  assert '70.0 % of 10 s are steps' in text and '2 incarnation(s)' in text
  assert 'step, s' in text and '7.00 (70.0 %)' in text
  assert 'compile' not in text
  assert len(_svgs(page)) == 3
  without = _Page(_write(tmp_path / 'b.html', goodput=goodput.Record(())))
  assert 'Goodput' not in ' '.join(without.texts)


def test_bars_of_incarnations_follow_each_other():
  ax = report.goodput_figure(
    _record(dict(start=2.0, step=5.0), dict(restart=1.0, step=2.0))
  ).axes[0]
  bars = [(p.get_y() + 0.35, p.get_x(), p.get_width()) for p in ax.patches]
  assert bars == [(1, 0, 2), (1, 2, 5), (2, 7, 1), (2, 8, 2)]


def test_every_category_of_time_has_a_color():
  record = _record(dict.fromkeys(goodput.CATEGORIES, 1.0))
  bars = report.goodput_figure(record).axes[0].patches
  colors = {p.get_facecolor() for p in bars}
  assert len(bars) == len(colors) == len(goodput.CATEGORIES)
