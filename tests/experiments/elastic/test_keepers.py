"""Keepers are dealt out to trainers, and replaced where they die."""

import os
import signal
import time

import pytest

from experiments.elastic.keepers import Keepers
from jaxtrain.checkpoints.in_memory import reader


@pytest.fixture
def keepers():
  said = []
  keepers = Keepers(3, num_parity=1, snapshot_every=4, say=said.append)
  yield keepers
  keepers.close()
  assert all(c.exit_code() is not None for c in keepers._children)


def _dealt(keepers, slots):
  first, *rest = keepers.arguments(slots)
  addresses = first.removeprefix('--keepers=').split(',')
  assert rest[1] == '--snapshot_every=4'
  return [keepers._addresses.index(a) for a in addresses], rest[0]


def test_everyone_gets_its_own_and_its_share_of_the_others(keepers):
  assert _dealt(keepers, (0, 1, 2)) == ([0, 1, 2], '--num_parity=1')
  assert _dealt(keepers, (0, 2)) == ([0, 2], '--num_parity=1')
  assert _dealt(keepers, (1,)) == ([1, 0, 2], '--num_parity=1')
  found, silent = reader.find(keepers._addresses, 10.0)
  assert found == [] and not silent


def test_one_that_dies_is_replaced_where_it_was(keepers):
  before = list(keepers._addresses)
  os.kill(keepers._children[1].pid, signal.SIGKILL)
  deadline = time.monotonic() + 20
  while keepers._children[1].exit_code() is None:
    assert time.monotonic() < deadline
  keepers.revive()
  assert keepers._addresses == before
  assert not reader.find(before, 10.0)[1]


def test_all_start_anew(keepers):
  before = [c.pid for c in keepers._children]
  keepers.forget()
  assert not {c.pid for c in keepers._children} & set(before)
  assert not reader.find(keepers._addresses, 10.0)[1]
