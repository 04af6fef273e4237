r"""`experiments.train_lm` that fails on purpose, to try its supervisor.

python -m experiments.supervise --trainer=experiments.benchmarks.faulty_trainer

It takes the same flags. `faults.py` says how it is told what is to go wrong.
"""

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
from experiments.benchmarks import faults
from jaxtrain import run as run_lib


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
    workdir, heartbeat = flags.FLAGS.workdir, flags.FLAGS.heartbeat
    slot = int(pathlib.Path(heartbeat).stem)
    for kind in faults.due(workdir, slot, run.step):
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
