r"""`experiments.train_lm` that fails on purpose, to try its supervisor.

python -m experiments.supervise --trainer=experiments.benchmarks.faulty_trainer

It takes the same flags. What goes wrong is said in `faults.json` of the run's
folder: a list of {'slot', 'step', 'kind', 'always'}. After so many steps the
process of the slot (the name of its heartbeat file) does what `kind` says, once
in the whole run, or each time it comes by if `always` is true:

* 'kill': dies of SIGKILL; 'freeze': is stopped by SIGSTOP;
* 'hang': its loop waits for ever, while its other threads run;
* 'raise': ends with an exception;
* 'flip': one bit of one device's copy of the parameters turns over;
* 'nan': its rows of the next batch have weights that are not numbers.
"""

import json
import os
import pathlib
import signal
import sys
import time

from absl import app
from absl import flags
import jax
import numpy as np

from experiments import train_lm
from jaxtrain import run as run_lib

KINDS = ('kill', 'freeze', 'hang', 'raise', 'flip', 'nan')


def write(workdir, faults):
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


def _due(step):
  """Faults of this process before the next step, which it has not yet had."""
  workdir = pathlib.Path(flags.FLAGS.workdir)
  slot = int(pathlib.Path(flags.FLAGS.heartbeat).stem)
  for i, fault in enumerate(json.loads((workdir / 'faults.json').read_text())):
    if (fault['slot'], fault['step']) == (slot, step):
      done = workdir / f'fault_{i}_done'
      if fault['always'] or not done.exists():
        done.write_text(str(time.time()))
        yield fault['kind']


def _flip(params):
  """`params` with one bit of one device's shard of the first leaf changed."""
  (first, *rest), tree = jax.tree.flatten(params)
  shards = []
  for i, shard in enumerate(first.addressable_shards):
    data = np.array(shard.data)
    if i == 0:
      data.view(np.uint8).ravel()[2] ^= 1
    shards.append(jax.device_put(data, shard.device))
  first = jax.make_array_from_single_device_arrays(
    first.shape, first.sharding, shards
  )
  return jax.tree.unflatten(tree, [first, *rest])


def _wrapped(make_step):
  def step(run, batch, flags_):
    for kind in _due(run.step):
      print(f'fault: {kind} after step {run.step}', file=sys.stderr, flush=True)
      if kind == 'raise':
        raise RuntimeError('a fault that was asked for')
      if kind == 'nan':
        batch = {**batch, 'weights': batch['weights'] * np.nan}
      elif kind == 'flip':
        params = _flip(run.state.params)
        run.state = type(run.state)(**{**vars(run.state), 'params': params})
      elif kind == 'hang':
        while True:
          time.sleep(1)
      else:
        number = dict(kill=signal.SIGKILL, freeze=signal.SIGSTOP)[kind]
        os.kill(os.getpid(), number)
    return make_step(run, batch, flags_)

  return step


def main(argv):
  run_lib.Run._step = _wrapped(run_lib.Run._step)
  train_lm.main(argv)


if __name__ == '__main__':
  app.run(main)
