"""What trainers are told, and what of theirs is taken away."""

import json
import time

import pytest

from experiments.elastic.actions import Start
from experiments.elastic.trainers import Trainers
from jaxtrain.heartbeat import Heartbeat

_PROGRAM = """
import json, sys
print(json.dumps(sys.argv[1:]), flush=True)
sys.exit(3)
"""


@pytest.fixture
def make_trainers(tmp_path):
  program = tmp_path / 'program.py'
  program.write_text(_PROGRAM)
  said = []

  def make(devices=2):
    trainers = Trainers(
      tmp_path / 'run',
      ['--config=x'],
      devices_per_process=devices,
      accumulation=2,
      trainer=str(program),
      say=said.append,
    )
    return trainers, said

  return make


def _run(trainers, said, plan, more=()):
  """Starts trainers; returns what each was given once all have ended."""
  trainers.start(plan, more)
  deadline = time.monotonic() + 60
  while len(trainers.exits()) < len(plan.slots) or len(said) < len(plan.slots):
    assert time.monotonic() < deadline
    time.sleep(0.01)
  assert set(trainers.exits().values()) == {3}
  trainers.kill()
  assert trainers.exits() == trainers.beats() == {}
  given = {}
  for line in said:
    slot, _, text = line.partition('] ')
    given[int(slot[1:])] = json.loads(text)
  return given


def test_several_know_of_each_other(make_trainers, tmp_path):
  given = _run(*make_trainers(), Start((1, 3), 'data=4', 4), ['--keepers=a,b'])
  for index, slot in enumerate((1, 3)):
    arguments = given[slot]
    shared = {
      '--config=x',
      f'--workdir={tmp_path}/run',
      '--mesh=data=4',
      '--num_processes=2',
      f'--process_id={index}',
      '--simulate_devices=2',
      '--override=accumulation=4',
      '--keepers=a,b',
      f'--heartbeat={tmp_path}/run/heartbeats/{slot}.json',
    }
    (coordinator,) = set(arguments) - shared
    assert coordinator.startswith('--coordinator=127.0.0.1:')


def test_one_joins_nobody(make_trainers):
  (arguments,) = _run(
    *make_trainers(devices=0), Start((2,), 'data=1', 2)
  ).values()
  assert '--num_processes=1' in arguments
  for flag in ('--coordinator', '--simulate_devices', '--override'):
    assert not any(a.startswith(flag) for a in arguments)


def test_heartbeats_of_before_are_not_read(make_trainers, tmp_path):
  trainers, said = make_trainers()
  with Heartbeat(tmp_path / 'run' / 'heartbeats' / '0.json'):
    pass
  _run(trainers, said, Start((0,), 'data=1', 2))
  assert not (tmp_path / 'run' / 'heartbeats').exists()


def test_checkpoints_are_counted_when_whole_and_put_aside(
  make_trainers, tmp_path
):
  trainers, _ = make_trainers()
  assert trainers.saved_step() is None
  folder = tmp_path / 'run' / 'checkpoints'
  for name in ('00000004', '00000008', '00000012.orbax-checkpoint-tmp-1'):
    (folder / name).mkdir(parents=True)
  assert trainers.saved_step() == 8
  assert trainers.discard(after_step=4) == [8]
  assert trainers.saved_step() == 4
  (folder / '00000008').mkdir()  # Saved again, and wrong again.
  assert trainers.discard(after_step=7) == [8]
  aside = sorted(p.name for p in (tmp_path / 'run' / 'discarded').iterdir())
  assert aside == ['00000008.0', '00000008.1']
  assert trainers.discard(after_step=4) == []
