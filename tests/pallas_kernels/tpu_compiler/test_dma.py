"""Copies and semaphores, by hand."""

import dataclasses

import pytest

from pallas_kernels.tpu_compiler import chips
from pallas_kernels.tpu_compiler import dma
from pallas_kernels.tpu_compiler.values import ScheduleError

_CHIP = dataclasses.replace(
  chips.CHIPS['v5e'], dma=chips.DmaTiming(100.0, 40.0, 10.0)
)


def test_a_copy_takes_its_bytes_and_a_latency():
  engine = dma.DmaEngine(_CHIP, 1)
  assert engine.start(5.0, 200, 'hbm_read') == 5 + 200 / 10 + 100
  assert engine.bytes == dict(hbm_read=200, hbm_write=0, local=0)


def test_copies_share_one_pipe_but_their_latencies_overlap():
  engine = dma.DmaEngine(_CHIP, 1)
  engine.start(0.0, 200, 'hbm_read')
  assert engine.start(1.0, 50, 'hbm_write') == 20 + 5 + 40
  assert engine.start(1000.0, 50, 'hbm_read') == 1000 + 5 + 100


def test_two_cores_have_half_the_bandwidth_each():
  assert dma.DmaEngine(_CHIP, 2).start(0.0, 200, 'hbm_read') == 40 + 100


def test_hbm_to_hbm_reads_and_writes():
  engine = dma.DmaEngine(_CHIP, 1)
  assert engine.start(0.0, 200, 'hbm_both') == 40 + 100
  assert engine.bytes == dict(hbm_read=200, hbm_write=200, local=0)


def test_copies_within_a_core_leave_the_pipe_alone():
  engine = dma.DmaEngine(_CHIP, 1)
  engine.start(0.0, 1 << 20, 'local')
  assert engine.start(0.0, 200, 'hbm_read') == 120


def test_semaphore_waits_for_enough():
  semaphores = dma.Semaphores()
  semaphores.add_at(3, 50.0, 8)
  semaphores.add_at(3, 90.0, 8)
  assert semaphores.value(3, 49.0) == 0
  assert semaphores.wait(3, 60.0, lambda v: v >= 8, 'here') == 60
  assert semaphores.wait(3, 60.0, lambda v: v >= 16, 'here') == 90
  semaphores.set(3, 1, 95.0)
  assert semaphores.value(3, 100.0) == 1


def test_waiting_for_ever_is_an_error():
  semaphores = dma.Semaphores()
  semaphores.add_at(3, 50.0, 8)
  with pytest.raises(ScheduleError, match='bundle 7 waits for ever.*holds 8'):
    semaphores.wait(3, 0.0, lambda v: v >= 9, 'bundle 7')
