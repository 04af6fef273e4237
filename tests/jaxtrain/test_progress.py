"""A bar for people, lines for logs, nothing if not wanted."""

import sys

from jaxtrain.progress import Progress

_METRICS = {'loss': 2.5, 'tokens_per_s': 12345.6, 'mfu': 0.4321, 'nll': 2.4}


def _run(shown):
  with Progress(20, shown=shown) as progress:
    progress.start(10)
    progress.say('compiled')
    progress.step()
    progress.show(11, _METRICS)
    progress.show(11, {'eval_loss': 2.0})
    progress.show(12, {'grad_norm': 1.0})


def test_lines_without_a_terminal(capsys):
  _run(shown=True)
  assert capsys.readouterr().err.splitlines() == [
    'compiled',
    'step 11/20  loss 2.5000  tokens/s 12,346  MFU 43.2%',
    'step 11/20  eval 2.0000',
  ]


def test_a_bar_on_a_terminal(capsys, monkeypatch):
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
  _run(shown=True)
  text = capsys.readouterr().err
  assert '11/20' in text and 'loss=2.5000' in text and 'MFU=43.2%' in text
  assert 'eval=2.0000' in text and 'grad_norm' not in text


def test_nothing(capsys):
  _run(shown=False)
  assert capsys.readouterr().err == ''
