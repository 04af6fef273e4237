"""What is to go wrong in a `faulty_trainer`: `faults.json` of the run's folder.

A list of {'slot', 'step', 'kind', 'always'}. After so many steps the process of
the slot (the name of its heartbeat file) does what `kind` says, once in the
whole run, or each time it comes by if `always` is true:

* 'kill': dies of SIGKILL; 'freeze': is stopped by SIGSTOP;
* 'hang': its loop waits for ever, while its other threads run;
* 'raise': ends with an exception;
* 'flip': one bit of one device's copy of the parameters turns over;
* 'nan': its rows of the next batch have weights that are not numbers.
"""

from collections.abc import Iterator, Sequence
import json
import os
import pathlib
import time

KINDS = ('kill', 'freeze', 'hang', 'raise', 'flip', 'nan')


def write(workdir: str | os.PathLike, faults: Sequence[tuple]) -> None:
  """Writes `faults.json`.

  Args:
    workdir: Folder of the run; is made.
    faults: (slot, step, kind) or (slot, step, kind, always) each.

  Raises:
    ValueError: An unknown kind.
  """
  if unknown := {f[2] for f in faults} - set(KINDS):
    raise ValueError(f'{sorted(unknown)} are not of {", ".join(KINDS)}')
  names = ('slot', 'step', 'kind', 'always')
  lines = [dict(zip(names, (*f, False), strict=False)) for f in faults]
  workdir = pathlib.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / 'faults.json').write_text(json.dumps(lines))


def due(workdir: str | os.PathLike, slot: int, step: int) -> Iterator[str]:
  """Kinds that are due in a slot after so many steps; notes when."""
  workdir = pathlib.Path(workdir)
  for i, fault in enumerate(json.loads((workdir / 'faults.json').read_text())):
    if (fault['slot'], fault['step']) == (slot, step):
      done = workdir / f'fault_{i}_done'
      if fault['always'] or not done.exists():
        done.write_text(str(time.time()))
        yield fault['kind']


def happened_at(workdir: str | os.PathLike, index: int) -> float:
  """When a fault came, in seconds since the epoch."""
  return float((pathlib.Path(workdir) / f'fault_{index}_done').read_text())
