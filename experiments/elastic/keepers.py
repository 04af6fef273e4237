"""Processes that keep snapshots in memory while trainers come and go."""

from collections.abc import Callable, Sequence
import sys
import threading

from experiments.elastic import processes

_MODULE = 'jaxtrain.checkpoints.in_memory.keeper'
_READY = 'keeper ready at '
_START_S = 60.0


class Keepers:
  """One keeper per slot, and at least two.

  On machines of their own each slot would have its own; here they all live, and
  trainers of fewer slots share them all.

  Args:
    num_slots: Places for a trainer.
    num_parity: How many keepers may be lost at once.
    snapshot_every: Steps between snapshots.
    say: Called with each line of output.

  Raises:
    RuntimeError: One did not start.
  """

  def __init__(
    self,
    num_slots: int,
    *,
    num_parity: int,
    snapshot_every: int,
    say: Callable[[str], None],
  ):
    self._num_parity, self._every = num_parity, snapshot_every
    self._say = say
    self._children: list[processes.Child] = []
    self._addresses: list[str] = []
    try:
      for index in range(max(num_slots, num_parity + 1)):
        self._addresses.append('')
        self._children.append(self._start(index, port=0))
    except BaseException:
      self.close()
      raise

  def arguments(self, slots: Sequence[int]) -> list[str]:
    """Flags of the trainers of these slots, the same for all of them.

    Each gets as many keepers as there are for each, its own first.
    """
    spare = [i for i in range(len(self._addresses)) if i not in slots]
    more = len(self._addresses) // len(slots) - 1
    order = []
    for i, slot in enumerate(slots):
      order += [slot, *spare[i * more : (i + 1) * more]]
    addresses = [self._addresses[i] for i in order]
    return [
      f'--keepers={",".join(addresses)}',
      f'--num_parity={min(self._num_parity, len(order) - 1)}',
      f'--snapshot_every={self._every}',
    ]

  def revive(self) -> None:
    """Starts those that have died anew, empty, where they were."""
    for i, child in enumerate(self._children):
      if child.exit_code() is not None:
        self._say(f'supervise: keeper {i} has died, another takes its place')
        port = int(self._addresses[i].rpartition(':')[2])
        self._children[i] = self._start(i, port)

  def forget(self) -> None:
    """Throws all snapshots away."""
    for child in self._children:
      child.kill()
    self.revive()

  def close(self) -> None:
    """Ends all."""
    for child in self._children:
      child.kill()

  def _start(self, index, port):
    ready, lines = threading.Event(), []

    def hear(line):
      lines.append(line)
      if _READY in line:
        self._addresses[index] = line.partition(_READY)[2].strip()
        ready.set()
      else:
        self._say(line)

    command = [sys.executable, '-m', _MODULE, f'--port={port}']
    child = processes.Child(f'keeper {index}', command, hear)
    if not ready.wait(_START_S):
      child.kill()
      raise RuntimeError(f'keeper {index} did not start: {" ".join(lines)}')
    return child
