"""Metrics of a run as CSV, for people and notebooks, and for TensorBoard."""

import csv
import io
import os
import pathlib
from typing import Any, SupportsFloat

import jax
import tensorboardX

_STEP = 'step'


class MetricsWriter:
  """Appends metrics to `metrics.csv` and `tensorboard/` of a folder.

  The CSV has one row a step and one column a metric, in the order in which
  metrics first came; a metric that was not measured at a step is left empty.
  Every row is on disk when `write` returns.

  A resumed run gives the same folder: rows from its first step on are
  replaced, so that no step is there twice. Only process 0 writes; the others
  may call everything and nothing happens.

  Args:
    directory: Folder, made if it is not there.
  """

  def __init__(self, directory: str | os.PathLike):
    self._file = None
    self._board = None
    self._is_writer = jax.process_index() == 0
    if not self._is_writer:
      return
    self._directory = pathlib.Path(directory)
    self._directory.mkdir(parents=True, exist_ok=True)
    self._path = self._directory / 'metrics.csv'
    self._columns = [_STEP]
    self._step = -1
    self._row: dict[str, Any] = {}  # The last row, which may still grow,
    self._row_start = 0  # and where it starts in the file.

  def write(self, step: int, metrics: dict[str, SupportsFloat]) -> None:
    """Writes the metrics of a step.

    May be called again for the same step, say for training and evaluation.

    Args:
      step: Not smaller than at the last call.
      metrics: Scalars by name, such as `{'train/loss': 2.5}`.

    Raises:
      ValueError: A step before the last one, a metric called 'step', or a
        value that is not a scalar.
    """
    if not self._is_writer or not metrics:
      return
    values = {name: _scalar(name, value) for name, value in metrics.items()}
    if self._file is None:
      self._open(step)
    if step < self._step:
      raise ValueError(f'step={step} comes after step {self._step}')
    if new := [name for name in values if name not in self._columns]:
      self._rewrite(self._columns + new, read(self._directory))
    if step == self._step:
      self._file.truncate(self._row_start)
      self._file.seek(self._row_start)
    else:
      self._row, self._row_start = {_STEP: step}, self._file.tell()
    self._step = step
    self._row |= values
    self._append(self._row)
    self._file.flush()
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def close(self) -> None:
    """Flushes and closes the files."""
    if self._file is not None:
      self._file.close()
      self._board.close()
      self._file = self._board = None

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *error) -> None:
    self.close()

  def _open(self, step):
    """Continues the files of an earlier run, which went on from `step`."""
    rows = [r for r in read(self._directory) if r[_STEP] < step]
    names = dict.fromkeys(name for row in rows for name in row)
    self._rewrite([_STEP, *(n for n in names if n != _STEP)], rows)
    # Hides what the earlier run wrote from here on.
    self._board = tensorboardX.SummaryWriter(
      str(self._directory / 'tensorboard'),
      purge_step=step,
      # Else a run resumed within a second overwrites its own file.
      filename_suffix=f'.{step}',
    )

  def _rewrite(self, columns, rows):
    """Replaces the file at once, so that a kill leaves the old or the new."""
    if self._file is not None:
      self._file.close()
    self._columns = columns
    new = self._path.with_suffix('.new')
    self._file = new.open('w', newline='', encoding='utf-8')
    csv.writer(self._file).writerow(columns)
    for row in rows:
      self._row_start = self._file.tell()
      self._append(row)
    self._file.flush()
    new.replace(self._path)

  def _append(self, row):
    csv.writer(self._file).writerow(
      ['' if (v := row.get(c)) is None else repr(v) for c in self._columns]
    )


def read(directory: str | os.PathLike) -> list[dict[str, Any]]:
  """Rows of `metrics.csv`: `{'step': int, name: float, ...}`, without gaps.

  A last row that a killed process has left unfinished is left out. No file is
  no rows.
  """
  path = pathlib.Path(directory) / 'metrics.csv'
  if not path.exists():
    return []
  text = path.read_bytes().decode()
  whole = text[: text.rfind('\n') + 1]
  lines = csv.reader(io.StringIO(whole, newline=''))
  columns = next(lines, [])
  return [
    {
      c: int(v) if c == _STEP else float(v)
      for c, v in zip(columns, line, strict=True)
      if v
    }
    for line in lines
  ]


def _scalar(name, value):
  if name == _STEP:
    raise ValueError(f'a metric may not be called {_STEP!r}')
  try:
    return float(value)
  except (TypeError, ValueError) as e:
    raise ValueError(f'metric {name!r} is not a scalar: {e}') from e
