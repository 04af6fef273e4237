"""Whoever is killed and whenever: a whole snapshot is left, never a mixture.

The trainer is a process without jax that writes bytes made of the step's number
as fast as it can, says which steps counted, and is killed at a random moment.
"""

import json
import os
import pathlib
import random
import signal
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from jaxtrain.checkpoints.in_memory import checksums
from jaxtrain.checkpoints.in_memory import exchange
from jaxtrain.checkpoints.in_memory import reader
from jaxtrain.checkpoints.in_memory import wire
from jaxtrain.checkpoints.in_memory.exchange import Exchange
from jaxtrain.checkpoints.in_memory.feed import Feed
from jaxtrain.checkpoints.in_memory.keeper import Keeper
from jaxtrain.checkpoints.in_memory.keeper import KeeperProcess
from jaxtrain.checkpoints.in_memory.versions import Group
from jaxtrain.checkpoints.in_memory.wire import RefusedError

_ROOT = pathlib.Path(__file__).parents[4]
_NUM_BYTES = 3_000_000
_TRAINER = """
import sys
from concurrent import futures
import numpy as np
from jaxtrain.checkpoints.in_memory import checksums
from jaxtrain.checkpoints.in_memory.feed import Feed
from jaxtrain.checkpoints.in_memory.versions import Group

generation, step, num_parity, num_bytes, *members = sys.argv[1:]
generation, step, num_bytes = int(generation), int(step), int(num_bytes)
group = Group(tuple(members), int(num_parity), 0)
chunk_bytes = group.stripes.chunk_bytes(num_bytes)
group = Group(group.members, group.num_parity, chunk_bytes)
feeds = [Feed(m, 20.0) for m in members]

def feed(i):
  data = feeds[i].begin((generation, step), group, i)
  # Member i has fewer bytes than the ones before it.
  used = num_bytes - 1000 * i
  data[:used].view(np.int64)[:] = step
  chunks = [
    data[a : max(a, min(a + chunk_bytes, used))]
    for a in range(0, data.size, chunk_bytes)
  ]
  sums = [checksums.of_chunk(c) for c in chunks]
  return feeds[i].end({'num_bytes': used, 'checksums': sums}, data)

with futures.ThreadPoolExecutor(len(feeds)) as pool:
  while True:
    step += 1
    if all(r['is_committed'] for r in pool.map(feed, range(len(feeds)))):
      print(step, flush=True)
"""


class _Trainer:
  """A trainer, and what it says."""

  def __init__(self, generation, step, num_parity, members):
    arguments = [generation, step, num_parity, _NUM_BYTES, *members]
    self.process = subprocess.Popen(
      [sys.executable, '-c', _TRAINER, *map(str, arguments)],
      stdout=subprocess.PIPE,
      text=True,
      cwd=_ROOT,
    )
    self.steps = []
    self._thread = threading.Thread(target=self._listen)
    self._thread.start()

  def _listen(self):
    for line in self.process.stdout:
      self.steps.append(int(line))

  def wait_for(self, count):
    end = time.monotonic() + 30
    while len(self.steps) < count and time.monotonic() < end:
      time.sleep(0.002)
    assert len(self.steps) >= count

  def kill(self):
    """Kills it; returns the last step that counted."""
    self.process.kill()
    self.process.wait()
    self._thread.join()
    self.process.stdout.close()
    return self.steps[-1]


def _read(addresses, dtype=np.int64):
  """The step that everything of the newest whole version is made of."""
  found, silent = reader.find(addresses, 20)
  chosen = reader.choose(found, None)
  assert chosen is not None, reader.why_none(found, silent, None)
  with reader.Reader(chosen, 20) as source:
    source.fetch({i: [(0, h['num_bytes'])] for i, h in source.headers.items()})
    assert not source.damaged
    for data in source.data.values():
      np.testing.assert_array_equal(data.view(dtype), chosen.id[1])
  return chosen.id[1]


@pytest.mark.parametrize('num_parity', [1, 2])
def test_killed_at_random_moments(num_parity):
  rng = random.Random(num_parity)
  keepers = [KeeperProcess(idle_exit_s=120) for _ in range(4)]
  step, trainer = 0, None
  try:
    for round_number in range(6):
      members = [k.address for k in keepers]
      trainer = _Trainer(round_number, step, num_parity, members)
      trainer.wait_for(2)
      time.sleep(rng.uniform(0, 0.05))
      lost = rng.sample(range(4), rng.randint(0, num_parity))
      how = rng.choice(['host', 'keepers first', 'trainer first'])
      if how == 'trainer first':
        last = trainer.kill()
      for i in lost:
        keepers[i].process.send_signal(signal.SIGKILL)
      if how == 'keepers first':
        # The trainer goes on without them.
        trainer.wait_for(len(trainer.steps) + 2)
        time.sleep(rng.uniform(0, 0.03))
      if how != 'trainer first':
        last = trainer.kill()
      step = _read(members)
      assert last <= step <= last + 1
      for i in lost:
        keepers[i].kill()
        keepers[i] = KeeperProcess(idle_exit_s=120)
  finally:
    if trainer is not None:
      trainer.process.kill()
    for keeper in keepers:
      keeper.kill()


class _Members:
  """Keepers in threads, and a trainer for each."""

  def __init__(self, count):
    self.keepers = [Keeper() for _ in range(count)]
    self.addresses = tuple(k.address for k in self.keepers)
    self.group = Group(self.addresses, 1, 64)
    self.feeds = [Feed(address, 5.0) for address in self.addresses]

  def __enter__(self):
    return self

  def __exit__(self, *error):
    for keeper in self.keepers:
      keeper.close()

  def start(self, step, indices):
    """Starts to write a version; threads, and where their answers come."""
    answers = {}

    def one(i):
      data = self.feeds[i].begin((0, step), self.group, i)
      data[:] = step
      answers[i] = self.feeds[i].end(_header(data), data)

    jobs = [threading.Thread(target=one, args=(i,)) for i in indices]
    for job in jobs:
      job.start()
    return jobs, answers

  def write(self, step):
    """Writes a version that counts."""
    jobs, answers = self.start(step, range(len(self.keepers)))
    for job in jobs:
      job.join(10)
    assert all(a['is_committed'] for a in answers.values()), answers

  def steps(self):
    """Steps that each keeper has."""
    return [
      [v['version'][1] for v in k.versions.describe()] for k in self.keepers
    ]


def _header(data):
  sums = [checksums.of_chunk(c) for c in data.reshape(-1, 64)]
  return {'num_bytes': data.size, 'checksums': sums}


def test_half_a_contribution_spoils_a_version_and_not_the_one_before():
  with _Members(3) as members:
    members.write(1)
    jobs, answers = members.start(2, [0, 1])
    # Member 2 says that it sends 64 bytes, sends 10 and dies.
    ((chunk, row),) = members.group.stripes.chunks_for(2, 0)
    message = {
      'op': 'contribute',
      'version': (0, 2),
      'group': members.group.to_json(),
      'sender': 2,
      'receiver': 0,
      'header': {},
      'chunks': [(chunk, row, 64)],
      'bytes': 64,
    }
    sock = wire.connect(members.addresses[0], 5)
    sock.sendall(_frame(message) + b'x' * 10)
    sock.close()
    for job in jobs:
      job.join(10)
    assert not any(a['is_committed'] for a in answers.values())
    assert 'a member was lost while it sent' in answers[0]['reason']
    assert members.addresses[0] in answers[1]['reason']
    found, _ = reader.find(members.addresses, 5)
    assert reader.choose(found, None).id == (0, 1)
    # The same step cannot be begun again, a later one can.
    with pytest.raises(RefusedError, match='step 2 does not come after'):
      members.feeds[0].begin((0, 2), members.group, 0)
    members.write(3)
    assert members.steps() == [[1, 3]] * 3


@pytest.mark.parametrize('reached', [[], [0], [1], [0, 1]])
def test_a_trainer_goes_on_where_its_keeper_has_died(reached):
  with _Members(3) as members:
    members.write(1)
    jobs, answers = members.start(2, [0, 1])
    data = np.full(128, 2, np.uint8)
    dying = Exchange((0, 2), members.group, 2, 5.0)
    for index in reached:
      dying._contribute(index, _header(data), data)
    dying.close()
    members.keepers[2].close()
    answer = exchange.run_for_trainer(
      (0, 2), members.group, 2, _header(data), data, 5.0
    )
    assert answer['is_committed'], answer
    for job in jobs:
      job.join(10)
    for i in (0, 1):
      assert answers[i]['is_committed'], answers
      assert list(answers[i]['absent']) == [members.addresses[2]]
    # Of member 2 there is parity alone.
    assert _read(members.addresses, np.uint8) == 2


def test_nothing_goes_before_something_newer_counts():
  with _Members(3) as members:
    members.write(1)
    members.write(2)
    for step in (3, 4, 5):
      for i in (0, 1):
        members.feeds[i].begin((0, step), members.group, i)
      assert members.steps() == [[1, 2, step], [1, 2, step], [1, 2]]
      assert _read(members.addresses, np.uint8) == 2


def _frame(message):
  text = json.dumps(message).encode()
  return struct.pack('<I', len(text)) + text


def test_what_nobody_finishes_is_not_restored():
  with _Members(2) as members:
    members.feeds[0].begin((0, 1), members.group, 0)[:] = 1
    found, silent = reader.find(members.addresses, 5)
    assert reader.choose(found, None) is None
    assert 'step 1: nobody knows what' in reader.why_none(found, silent, None)


def test_bytes_that_are_no_message_do_no_harm():
  with _Members(2) as members:
    address = members.addresses[0]
    for junk in (b'\xff' * 64, _frame({'op': 'nothing', 'bytes': 0})):
      sock = wire.connect(address, 5)
      sock.sendall(junk)
      sock.close()
    peer = wire.Peer(address, wire.connect(address, 5))
    for message in (
      {'op': 'nothing'},
      {'op': 'read', 'version': (0, 1), 'part': 0, 'ranges': []},
      {'op': 'begin'},
    ):
      with pytest.raises(RefusedError):
        peer.ask(message)
    assert peer.ask({'op': 'versions'})[0]['versions'] == []


def test_a_keeper_says_why_it_does_not_start():
  with _Members(2) as members:
    port = int(members.addresses[0].split(':')[1])
    with pytest.raises(RuntimeError, match=f'127.0.0.1:{port} did not start'):
      KeeperProcess(port=port)


def test_a_keeper_is_small_and_ready_at_once():
  keeper = KeeperProcess(idle_exit_s=60)
  proc = pathlib.Path(f'/proc/{keeper.process.pid}')
  try:
    maps, status, stat = [
      (proc / name).read_text() for name in ('maps', 'status', 'stat')
    ]
  finally:
    keeper.kill()
  assert 'jaxlib' not in maps
  assert int(status.partition('VmRSS:')[2].split()[0]) < 80_000  # kB
  # CPU time: the machine may be busy otherwise.
  user, system = stat.rpartition(')')[2].split()[11:13]
  assert int(user) + int(system) < 1.5 * os.sysconf('SC_CLK_TCK')


def test_an_idle_keeper_ends_if_it_is_told_to():
  keeper = KeeperProcess(idle_exit_s=0.5)
  assert keeper.process.wait(timeout=20) == 0
  keeper.process.stdout.close()
