"""The trainers of one incarnation, and what they leave in the run's folder."""

from collections.abc import Callable, Mapping, Sequence
import pathlib
import shutil
import sys

from experiments.elastic import actions
from experiments.elastic import processes
from jaxtrain import heartbeat
from jaxtrain.heartbeat import Beat

# Not `--module`: a file is run as it is, so that tests can wrap the trainer.
_MODULE = 'experiments.train_lm'


class Trainers:
  """Starts and ends processes of `experiments.train_lm`.

  Args:
    workdir: Folder of the run.
    arguments: Those that are the same for all.
    devices_per_process: CPU devices that each simulates; 0 takes its real ones.
    accumulation: That of the config, which is not said again.
    trainer: Module to run, or path of a .py file.
    say: Called with each line of output.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    arguments: Sequence[str],
    *,
    devices_per_process: int,
    accumulation: int = 1,
    trainer: str = _MODULE,
    say: Callable[[str], None],
  ):
    self._workdir = workdir
    self._beats = workdir / 'heartbeats'
    self._arguments = list(arguments)
    self._devices = devices_per_process
    self._accumulation = accumulation
    is_file = trainer.endswith('.py')
    self._program = [sys.executable, *([] if is_file else ['-m']), trainer]
    self._say = say
    self._children: dict[int, processes.Child] = {}

  def start(self, plan: actions.Start, more: Sequence[str] = ()) -> None:
    """Starts one process per slot; those of before must have ended.

    Args:
      plan: Which, and on what mesh.
      more: Further arguments, the same for all.
    """
    shutil.rmtree(self._beats, ignore_errors=True)
    shared = [
      *(f'--workdir={self._workdir}', f'--mesh={plan.mesh}'),
      f'--num_processes={len(plan.slots)}',
      *self._arguments,
      *more,
    ]
    if len(plan.slots) > 1:
      shared.append(f'--coordinator=127.0.0.1:{processes.free_port()}')
    if self._devices:
      shared.append(f'--simulate_devices={self._devices}')
    if plan.accumulation != self._accumulation:
      shared.append(f'--override=accumulation={plan.accumulation}')
    for index, slot in enumerate(plan.slots):
      own = [f'--process_id={index}', f'--heartbeat={self._file(slot)}']
      self._children[slot] = processes.Child(
        str(slot), [*self._program, *shared, *own], self._say
      )

  def exits(self) -> dict[int, int]:
    """Slot -> exit code of those that have ended."""
    codes = {s: child.exit_code() for s, child in self._children.items()}
    return {slot: code for slot, code in codes.items() if code is not None}

  def beats(self) -> Mapping[int, Beat]:
    """Slot -> heartbeat of those that have one."""
    found = {s: heartbeat.read(self._file(s)) for s in self._children}
    return {slot: beat for slot, beat in found.items() if beat is not None}

  def pids(self) -> dict[int, int]:
    """Slot -> process."""
    return {slot: child.pid for slot, child in self._children.items()}

  def terminate(self) -> None:
    """Asks all to save and end."""
    for child in self._children.values():
      child.terminate()

  def kill(self) -> None:
    """Ends all that is left of them."""
    for child in self._children.values():
      child.send_kill()  # Before they can see each other die.
    for child in self._children.values():
      child.kill()
    self._children = {}

  def saved_step(self) -> int | None:
    """Step of the newest whole checkpoint."""
    return max(map(int, (p.name for p in self._checkpoints())), default=None)

  def discard(self, after_step: int) -> list[int]:
    """Puts checkpoints of later steps aside, where nobody restores them.

    Returns:
      Their steps.
    """
    aside = self._workdir / 'discarded'
    wrong = [p for p in self._checkpoints() if int(p.name) > after_step]
    for path in wrong:
      aside.mkdir(exist_ok=True)
      count = len(list(aside.glob(f'{path.name}*')))
      path.rename(aside / f'{path.name}.{count}')
    return sorted(int(p.name) for p in wrong)

  def _checkpoints(self):
    # Unfinished ones have longer names.
    folder = self._workdir / 'checkpoints'
    return [p for p in folder.glob('*') if p.name.isdigit()]

  def _file(self, slot):
    return self._beats / f'{slot}.json'
