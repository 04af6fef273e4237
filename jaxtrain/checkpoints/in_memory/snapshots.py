r"""Snapshots of a training state in other processes, from the trainer's side.

"Reliable and Efficient In-Memory Fault Tolerance of Large Language Model
Pretraining", Wang et al., https://arxiv.org/abs/2310.12670 (REFT). Of its text
only the abstract was at hand: sharded snapshots, taken asynchronously into the
memory of snapshot processes, which outlive the trainer, with erasure codes over
nodes; storage is the second tier (`manager.CheckpointManager`). Deviations: any
number of lost keepers by Reed-Solomon codes besides XOR; two whole versions and
one being written instead of one and one; checksums.

On every host, before the trainers and not as their children:

    python -m jaxtrain.checkpoints.in_memory.keeper --host=10.0.0.4 --port=7000

(or `keeper.KeeperProcess(host, port)`), which is ready in a quarter of a second
and says so in a line. Then in every trainer, with the same arguments:

    snapshots = InMemorySnapshots(
      ['10.0.0.4:7000', '10.0.0.5:7000', '10.0.0.6:7000'], num_parity=1)
    if steps := snapshots.steps():  # Of which the last is the newest.
      state, data_state, metadata = snapshots.restore(abstract_state)
    ...
    snapshots.save(step, state, data_state=...)  # Every step.

There are r keepers for each process, `keepers[r * i : r * (i + 1)]` being of
process i and on its host; to survive the loss of a host, `num_parity` must be
at least r. A process that dies costs nothing. A keeper that dies costs one of
the `num_parity` losses that the group survives, until another is started at its
address and the next snapshot is taken.

A new generation with other members (a host is lost, or one more is there): give
the new trainers the addresses that they shall use from now on, each host its
own keeper, the surviving ones as they are. Keepers know of no group: every
version names its own, and `steps` and `restore` follow those names. So they
find what the group before has saved, as long as one of the addresses given
knows of it, whatever the number of processes or the mesh. Old versions go when
as many new ones as are to be kept are whole. `reader.restorable_steps` tells a
supervisor, without jax, what there is.
"""

from collections.abc import Sequence
import json
import logging
import os
import pathlib
import threading
import time
from typing import Any

import jax
import numpy as np

from jaxtrain.checkpoints import abstract
from jaxtrain.checkpoints import staging
from jaxtrain.checkpoints.in_memory import assembly
from jaxtrain.checkpoints.in_memory import processes
from jaxtrain.checkpoints.in_memory import reader
from jaxtrain.checkpoints.in_memory import wire
from jaxtrain.checkpoints.in_memory.stripes import Stripes
from jaxtrain.checkpoints.in_memory.writer import Writer

_log = logging.getLogger(__name__)
_WHEN_BUSY = ('wait', 'skip')


class InMemorySnapshots:
  """Saves to and restores from keepers. Call from every process.

  Args:
    keepers: 'host:port' of every keeper, in the order of their processes.
    num_parity: How many of them may be lost at once; costs as many times
      1 / (len(keepers) - num_parity) of the memory.
    when_busy: What `save` does while the snapshot before is on its way: 'wait'
      for it, or 'skip' this step (one process only, for others would skip
      others).
    timeout_s: After how long without an answer a keeper counts as gone; more
      than it takes to exchange a snapshot.
    generation: Orders the runs of trainers, later ones being greater, the same
      in all processes; `None` is the clock of process 0.

  Attributes:
    blocked_s: How long `save` has waited for snapshots before, seconds.
    saved: Snapshots that counted.
    failed: Snapshots that did not.
    absent: Keepers that the last snapshot was made without, and why.

  Raises:
    ValueError: Addresses that are none or there twice, `num_parity` not in
      1..len(keepers) - 1, processes that do not divide keepers, an unknown
      `when_busy`, keepers on other hosts than their processes, or that do not
      answer, all of them.
  """

  def __init__(
    self,
    keepers: Sequence[str],
    num_parity: int = 1,
    *,
    when_busy: str = 'wait',
    timeout_s: float = 60.0,
    generation: int | None = None,
  ):
    _check(keepers, num_parity, when_busy, timeout_s)
    self._keepers = tuple(keepers)
    self._timeout_s = timeout_s
    self._when_busy = when_busy
    found, silent = reader.find(self._keepers, timeout_s)
    if generation is None:
      # Clocks of hosts differ: whatever it says, later than all that is there.
      latest = max((f.id[0] for f in found), default=0)
      generation = processes.agree(max(time.time_ns(), latest + 1))
    if not found and len(silent) == len(keepers):
      raise ValueError(f'no keeper answers: {"; ".join(silent.values())}')
    self._writer = Writer(self._keepers, num_parity, generation, timeout_s)
    self._busy: threading.Thread | None = None
    self._error: BaseException | None = None
    self.blocked_s = 0.0
    self.saved = self.failed = 0
    self.absent: dict[str, str] = {}
    self._writer.check()

  @classmethod
  def from_file(
    cls, path: str | os.PathLike, **arguments: Any
  ) -> 'InMemorySnapshots':
    """As a JSON file says, an object with arguments of this class.

    Raises:
      ValueError: The file is no such object.
    """
    try:
      given = json.loads(pathlib.Path(path).read_text())
      return cls(**{**given, **arguments})
    except (TypeError, json.JSONDecodeError) as e:
      raise ValueError(f'{os.fspath(path)}: {e}') from e

  def save(
    self,
    step: int,
    state: Any,
    *,
    data_state: Any = None,
    metadata: dict[str, Any] | None = None,
  ) -> bool:
    """Starts to take a snapshot; waits only for the one before.

    The arrays may be donated as soon as this returns. Keepers that are gone are
    done without: see `absent` and `failed`, and the log.

    Args:
      step: Number of the step, greater than those saved before.
      state: Pytree of arrays, random keys too. With several processes its
        arrays must be global.
      data_state: Where this process's data iterator stands, as JSON types.
      metadata: Anything else, as JSON types.

    Returns:
      Whether it has begun: not if it skips.

    Raises:
      ValueError: A negative step, something that is not JSON, an array of one
        process only; or of the snapshot before, a step that did not come after
        what the keepers have.
    """
    if step < 0:
      raise ValueError(f'step={step} is negative')
    for name, value in dict(data_state=data_state, metadata=metadata).items():
      _check_json(name, value)
    if self._busy is not None and self._busy.is_alive():
      if self._when_busy == 'skip':
        return False
    start = time.perf_counter()
    self.wait()
    self.blocked_s += time.perf_counter() - start
    about = {'data_state': data_state, 'metadata': metadata or {}}
    # Copies: the caller may overwrite `state` from now on.
    leaves = {
      name: leaf if isinstance(leaf, jax.Array) else np.array(leaf)
      for name, leaf in abstract.leaves(staging.to_host(state)).items()
    }
    self._busy = threading.Thread(
      target=self._write, args=(step, leaves, about), daemon=True
    )
    self._busy.start()
    return True

  def wait(self) -> None:
    """Waits for the snapshot on its way; raises what was wrong with it."""
    if self._busy is not None:
      self._busy.join()
      self._busy = None
    error, self._error = self._error, None
    if error is not None:
      raise error

  def steps(self) -> list[int]:
    """Steps that the living keepers can restore together, oldest first.

    With several processes, as process 0 sees it, in all of them: call it from
    all.
    """
    self.wait()
    return processes.agree(
      reader.restorable_steps(self._keepers, self._timeout_s)
    )

  def restore(
    self, abstract_state: Any, step: int | None = None
  ) -> tuple[Any, Any, dict[str, Any]]:
    """Reads a snapshot onto the shardings of `abstract_state`.

    These need not be those it was saved with, nor on as many devices or
    processes. Each process reads what its devices need.

    Args:
      abstract_state: Pytree like the saved one, of arrays or
        `jax.ShapeDtypeStruct`s with shardings. A leaf without sharding comes
        back as a NumPy array.
      step: Which; `None` is the newest that is whole.

    Returns:
      The state, this process's data state, and the metadata.

    Raises:
      ValueError: No such step (says which keepers are missing, and what steps
        there are), a state that it does not fit, leaves that are lost, or the
        data states of another number of processes that differ among each other.
    """
    self.wait()
    found = self._pick(step)
    with reader.Reader(found, self._timeout_s) as source:
      state = assembly.assemble(source, abstract_state)
      data_state = assembly.data_state(source)
      metadata = source.headers[0]['metadata']
      for address, block in sorted(source.damaged):
        _log.warning('%s: %s was damaged, and is mended', address, block)
    return state, data_state, metadata

  def close(self) -> None:
    """Waits, then closes connections; keepers keep what they have."""
    try:
      self.wait()
    finally:
      self._writer.close()

  def __enter__(self) -> 'InMemorySnapshots':
    return self

  def __exit__(self, *error) -> None:
    self.close()

  def _write(self, step, leaves, about):
    try:
      result = self._writer.write(step, leaves, about)
    except BaseException as e:
      self._error = e
      return
    self.absent = result['absent']
    if result['is_committed']:
      self.saved += 1
    else:
      self.failed += 1
      _log.warning(
        'No snapshot of step %d: %s. The one before stays',
        step,
        result['reason'],
      )

  def _pick(self, step):
    """The version to read, the same in all processes."""
    found, silent = reader.find(self._keepers, self._timeout_s)
    chosen = reader.choose(found, step)
    chosen_id = processes.agree(list(chosen.id) if chosen else None)
    if chosen_id is None:
      raise ValueError(reader.why_none(found, silent, step))
    for f in found:
      if list(f.id) == chosen_id:
        return f
    raise ValueError(f'step {chosen_id[1]} is gone, process 0 has found it')


def _check(keepers, num_parity, when_busy, timeout_s):
  for address in keepers:
    wire.parse_address(address)
  if len(set(keepers)) < len(keepers):
    raise ValueError(f'keepers={list(keepers)} names one twice')
  Stripes(len(keepers), num_parity)
  if when_busy not in _WHEN_BUSY:
    raise ValueError(f'when_busy={when_busy!r} is none of {_WHEN_BUSY}')
  if when_busy == 'skip' and jax.process_count() > 1:
    raise ValueError(
      "when_busy='skip' is for one process: several would skip different steps"
    )
  if timeout_s <= 0:
    raise ValueError(f'timeout_s={timeout_s} must be positive')


def _check_json(name, value):
  try:
    json.dumps(value)
  except (TypeError, ValueError) as e:
    raise ValueError(f'{name} is not JSON: {e}') from e
