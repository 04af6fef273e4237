"""Whoever is killed and whenever: a whole snapshot is left, never a mixture.

The trainer is a process without jax that writes bytes made of the step's number
as fast as it can, says which steps counted, and is killed at a random moment.
"""

import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from jaxtrain.checkpoints.in_memory import checksums
from jaxtrain.checkpoints.in_memory import reader
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


def _read(addresses):
  """The step that everything of the newest whole version is made of."""
  found, silent = reader.find(addresses, 20)
  chosen = reader.choose(found, None)
  assert chosen is not None, reader.why_none(found, silent, None)
  with reader.Reader(chosen, 20) as source:
    source.fetch({i: [(0, h['num_bytes'])] for i, h in source.headers.items()})
    assert not source.damaged
    values = {int(x) for d in source.data.values() for x in _ends(d)}
    for data in source.data.values():
      assert (data.view(np.int64) == chosen.id[1]).all(), values
  return chosen.id[1]


def _ends(data):
  numbers = data.view(np.int64)
  return numbers[0], numbers[-1]


@pytest.mark.parametrize('num_parity', [1, 2])
def test_killed_at_random_moments(num_parity):
  rng = random.Random(num_parity)
  keepers = [KeeperProcess(idle_exit_s=120) for _ in range(4)]
  step, trainer = 0, None
  try:
    for round_number in range(7):
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


def _threads(count):
  keepers = [Keeper() for _ in range(count)]
  return keepers, tuple(k.address for k in keepers)


def _header(data, used):
  sums = [checksums.of_chunk(c) for c in data.reshape(-1, 64)]
  return {'num_bytes': used, 'checksums': sums}


def test_half_a_contribution_spoils_a_version_and_not_the_one_before():
  keepers, members = _threads(3)
  group = Group(members, 1, 64)
  feeds = [Feed(m, 5.0) for m in members]

  def write(step, indices):
    results = {}

    def one(i):
      data = feeds[i].begin((0, step), group, i)
      data[:] = step
      results[i] = feeds[i].end(_header(data, 128), data)

    jobs = [threading.Thread(target=one, args=(i,)) for i in indices]
    for job in jobs:
      job.start()
    return jobs, results

  jobs, results = write(1, range(3))
  for job in jobs:
    job.join()
  assert all(r['is_committed'] for r in results.values())
  jobs, results = write(2, [0, 1])
  # Member 2 says that it sends 64 bytes, sends 10 and dies.
  exchange = Exchange((0, 2), group, 2, 5.0)
  ((chunk, row),) = group.stripes.chunks_for(2, 0)
  message = {
    'op': 'contribute',
    'version': (0, 2),
    'group': group.to_json(),
    'sender': 2,
    'receiver': 0,
    'header': {},
    'chunks': [(chunk, row, 10)],
    'bytes': 0,
  }
  peer = exchange._to(0)
  peer._sock.sendall(_frame(message) + b'x' * 5)
  peer.close()
  for job in jobs:
    job.join(10)
  assert not any(r['is_committed'] for r in results.values())
  assert 'a member was lost while it sent' in results[0]['reason']
  assert members[0] in results[1]['reason']
  found, _ = reader.find(members, 5)
  assert reader.choose(found, None).id == (0, 1)
  # The same step cannot be begun again, a later one can.
  with pytest.raises(RefusedError, match='step 2 does not come after'):
    feeds[0].begin((0, 2), group, 0)
  jobs, results = write(3, range(3))
  for job in jobs:
    job.join()
  assert all(r['is_committed'] for r in results.values())
  for keeper in keepers:
    assert [v['version'] for v in keeper.versions.describe()] == [
      (0, 1),
      (0, 3),
    ]
    keeper.close()


def _frame(message):
  import json
  import struct

  text = json.dumps(message).encode()
  return struct.pack('<I', len(text)) + text


def test_what_nobody_finishes_is_not_restored():
  keepers, members = _threads(2)
  group = Group(members, 1, 64)
  data = Feed(members[0], 5.0).begin((0, 1), group, 0)
  data[:] = 1
  found, silent = reader.find(members, 5)
  assert reader.choose(found, None) is None
  assert 'step 1: nobody knows what' in reader.why_none(found, silent, None)
  for keeper in keepers:
    keeper.close()


def test_bytes_that_are_no_message_do_no_harm():
  keepers, members = _threads(1)
  from jaxtrain.checkpoints.in_memory import wire

  for junk in (b'\xff' * 64, _frame({'op': 'nothing', 'bytes': 0})):
    sock = wire.connect(members[0], 5)
    sock.sendall(junk)
    sock.close()
  peer = wire.Peer(members[0], wire.connect(members[0], 5))
  for message in (
    {'op': 'nothing'},
    {'op': 'read', 'version': (0, 1), 'part': 0, 'ranges': []},
    {'op': 'begin'},
  ):
    with pytest.raises(RefusedError):
      peer.ask(message)
  assert peer.ask({'op': 'versions'})[0]['versions'] == []
  keepers[0].close()


def test_a_keeper_says_why_it_does_not_start():
  with Keeper_at_a_port() as port:
    with pytest.raises(RuntimeError, match=f'127.0.0.1:{port} did not start'):
      KeeperProcess(port=port)


class Keeper_at_a_port:
  def __enter__(self):
    self._keeper = Keeper()
    return int(self._keeper.address.split(':')[1])

  def __exit__(self, *error):
    self._keeper.close()


def test_a_keeper_is_small_and_ready_at_once():
  start = time.monotonic()
  keeper = KeeperProcess(idle_exit_s=60)
  seconds = time.monotonic() - start
  try:
    maps = pathlib.Path(f'/proc/{keeper.process.pid}/maps').read_text()
    status = pathlib.Path(f'/proc/{keeper.process.pid}/status').read_text()
  finally:
    keeper.kill()
  assert 'jaxlib' not in maps
  rss_kb = int(status.partition('VmRSS:')[2].split()[0])
  assert rss_kb < 80_000
  assert seconds < 5  # A quarter of a second on a quiet machine.


def test_an_idle_keeper_ends_if_it_is_told_to():
  keeper = KeeperProcess(idle_exit_s=0.5)
  assert keeper.process.wait(timeout=20) == 0
  keeper.process.stdout.close()
