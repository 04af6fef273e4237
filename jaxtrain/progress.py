"""Progress of a run on the terminal, or as lines in a log."""

from collections.abc import Mapping
import sys

import tqdm

_FORMATS = {
  'loss': '{:.4f}',
  'eval_loss': '{:.4f}',
  'tokens_per_s': '{:,.0f}',
  'mfu': '{:.1%}',
}
_LABELS = {'tokens_per_s': 'tokens/s', 'mfu': 'MFU', 'eval_loss': 'eval'}


class Progress:
  """A bar where standard error is a terminal, else a line per row of metrics.

  Args:
    steps: Length of the whole run.
    shown: False shows nothing.
  """

  def __init__(self, steps: int, shown: bool):
    self._steps = steps
    self._shown = shown
    self._bar: tqdm.tqdm | None = None
    self._values: dict[str, str] = {}

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *error) -> None:
    if self._bar is not None:
      self._bar.close()

  def start(self, step: int) -> None:
    """Starts at `step` updates already made."""
    if self._shown and sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        total=self._steps, initial=step, unit='step', dynamic_ncols=True
      )

  def step(self) -> None:
    """One more step is finished."""
    if self._bar is not None:
      self._bar.update()

  def show(self, step: int, metrics: Mapping[str, float]) -> None:
    """Shows those of the metrics that a person watches."""
    new = {
      _LABELS.get(name, name): form.format(metrics[name])
      for name, form in _FORMATS.items()
      if name in metrics
    }
    self._values |= new
    if self._bar is not None:
      self._bar.set_postfix(self._values)
    elif new:
      text = '  '.join(f'{name} {value}' for name, value in new.items())
      self.say(f'step {step}/{self._steps}  {text}')

  def say(self, text: str) -> None:
    """Prints a line, above the bar if there is one."""
    if self._shown:
      tqdm.tqdm.write(text, file=sys.stderr)
