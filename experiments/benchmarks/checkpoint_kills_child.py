"""What the processes do that `checkpoint_kills.py` forks and kills.

They save states of which every leaf tells its step, so that a mixture of two
would be seen, and say on a pipe what they have done.
"""

from collections.abc import Callable
import json
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np

from jaxtrain.checkpoints import disk_space
from jaxtrain.checkpoints import file_list
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.checkpoints.manager import DamagedError
from jaxtrain.checkpoints.manager import NoSpaceError

# 1.5 MB of noise, which does not compress, and two small leaves. The devices of
# every run divide the rows.
_SHAPES = {
  'params/w': (240, 512),
  'params/v': (480, 256),
  'opt/m': (240, 512),
  'opt/b': (64,),
  'opt/count': (),
}
_KEEP = 2

Say = Callable[[dict[str, Any]], None]


def start(num_devices: int, index: int, count: int, address: str) -> None:
  """Starts JAX on simulated devices, and joins the other processes."""
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', num_devices)
  if count > 1:
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(address, count, index)


def _values(step):
  values = {}
  for i, (name, shape) in enumerate(_SHAPES.items()):
    noise = np.random.default_rng(i).random(shape, np.float32)
    values[name] = (noise + np.float32(step)).astype(np.float32)
  return values


def _state(step):
  mesh = jax.make_mesh((jax.device_count(),), ('x',))
  state: dict[str, dict[str, jax.Array]] = {}
  for name, value in _values(step).items():
    spec = jax.P('x') if value.ndim == 2 else jax.P()
    sharding = jax.sharding.NamedSharding(mesh, spec)
    group, leaf = name.split('/')
    place = lambda index: value[index]
    state.setdefault(group, {})[leaf] = jax.make_array_from_callback(
      value.shape, sharding, place
    )
  return state


def _check(state, step):
  """Raises unless every leaf is that of `step`, on every device of ours."""
  for name, want in _values(step).items():
    group, leaf = name.split('/')
    for shard in state[group][leaf].addressable_shards:
      np.testing.assert_array_equal(shard.data, want[shard.index], name)


def save_for_ever(say: Say, folder: pathlib.Path) -> None:
  """Checks all that is there, resumes, and saves until it is killed."""
  with CheckpointManager(folder, keep=_KEEP) as manager:
    for step in manager.all_steps():
      manager.verify(step)
    found = manager.resume(_state(0))
    step = 0
    if found is not None:
      step = found.step
      _check(found.state, step)
      assert found.data_state == found.metadata['step'] == step
      assert not found.damaged, found.damaged
    say({'resumed': step, 'steps': manager.all_steps()})
    while True:
      step += 1
      state = _state(step)
      begin = time.monotonic()
      say({'begin': step})
      manager.save(step, state, data_state=step, metadata={'step': step})
      manager.wait()
      say({'end': step, 'seconds': time.monotonic() - begin})


def save_some(say: Say, folder: pathlib.Path, steps: int) -> None:
  """Saves steps 1, 2, ..."""
  with CheckpointManager(folder, keep=None) as manager:
    for step in range(1, steps + 1):
      data = dict(data_state=step, metadata={'step': step})
      manager.save(step, _state(step), **data)
  say({'saved': steps})


def resume_damaged(
  say: Say, folder: pathlib.Path, kind: str, seed: int
) -> None:
  """Damages the newest checkpoint at a random place; must resume before it."""
  with CheckpointManager(folder) as manager:
    *_, previous, newest = manager.all_steps()
    name, position, arrays = _damage(folder / f'{newest:08d}', kind, seed)
    try:
      manager.restore(_state(0), newest)
      raise AssertionError(f'{kind} {name} at {position} was not noticed')
    except DamagedError as e:
      named = str(e)
    assert name in named, f'{named} does not name {name}'
    assert any(a in named for a in arrays), f'{named} does not name {arrays}'
    found = manager.resume(_state(0))
    _check(found.state, found.step)
    assert found.step == previous, (found.step, previous)
    assert len(found.damaged) == 1
  say({'named': named})


def _damage(folder, kind, seed):
  """Where it was done, and what an error must name one of."""
  rng = np.random.default_rng(seed)
  listed = file_list.read(folder)
  own = (folder / file_list.NAME).stat().st_size
  sizes = listed.sizes | {file_list.NAME: own}
  names = sorted(sizes)
  weights = np.array([sizes[n] for n in names], float) / sum(sizes.values())
  # Half of the time every byte is as likely as every other, half every file.
  weights = weights if seed % 2 else None
  name = names[rng.choice(len(names), p=weights)]
  path = folder / name
  data = bytearray(path.read_bytes())
  position = int(rng.integers(len(data)))
  path.unlink()
  if kind == 'truncated':
    path.write_bytes(data[:position])
    return name, position, [name]
  if kind == 'deleted':
    return name, position, [name]
  data[position] ^= 1 << int(rng.integers(8))
  path.write_bytes(data)
  for piece in listed.pieces:
    s = piece.span
    if s.file == name and s.start <= position < s.start + s.size and s.array:
      return name, position, [f'{s.array} [']
  return name, position, [name]


def fill_the_disk(say: Say, folder: pathlib.Path) -> None:
  """Saves until the disk is full; the checkpoint before must be whole."""
  disk_space.shortage = lambda *args: ''  # It is to fill up while it writes.
  step = 0
  with CheckpointManager(folder, keep=None) as manager:
    try:
      while True:
        step += 1
        data = dict(data_state=step, metadata={'step': step})
        manager.save(step, _state(step), **data)
        manager.wait()
    except NoSpaceError as e:
      named = str(e)
    assert str(folder) in named and f'step {step}' in named, named
    left = {p.name for p in folder.iterdir()} - {'saver.lock'}
    assert left == {f'{s:08d}' for s in range(1, step)}, left
    found = manager.resume(_state(0)) if step > 1 else None
    if found is not None:
      assert found.step == step - 1 and not found.damaged
      _check(found.state, found.step)
  say({'named': named, 'resumed': step - 1})


def speaker(fd: int) -> Say:
  """Says things as lines of JSON."""

  def say(what):
    os.write(fd, json.dumps(what).encode() + b'\n')

  return say
