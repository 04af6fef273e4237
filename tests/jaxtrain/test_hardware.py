"""Peaks are looked up by device kind, and measured on a CPU."""

import dataclasses

import jax
import pytest

from jaxtrain import hardware


@dataclasses.dataclass(frozen=True)
class _Device:
  device_kind: str
  platform: str = 'tpu'
  process_index: int = 0


@pytest.mark.parametrize(
  'kind, tflops',
  [
    ('TPU v4', 275),
    ('TPU v5 lite', 197),
    ('TPU v5e', 197),
    ('TPU v5', 459),
    ('TPU v5p', 459),
    ('TPU v6 lite', 918),
    ('TPU v6e', 918),
    ('TPU7x', 1153.5),
    ('NVIDIA A100-SXM4-80GB', 312),
    ('NVIDIA H100 80GB HBM3', 989),
    ('NVIDIA H100 PCIe', 756),
    ('NVIDIA H200', 989),
    ('NVIDIA B200', 2250),
  ],
)
def test_known_kinds(kind, tflops):
  peak = hardware.peak([_Device(kind)] * 4)
  assert peak.flops_per_s == pytest.approx(4e12 * tflops)
  assert kind in peak.source


def test_devices_may_come_from_an_iterator():
  devices = [_Device('TPU v4')] * 3
  assert hardware.peak(iter(devices)) == hardware.peak(devices)


@pytest.mark.parametrize('kind', ['TPU v99', 'NVIDIA H1000', 'Banana'])
def test_unknown_kind_has_no_peak(kind):
  assert hardware.peak([_Device(kind)]) is None


def test_simulated_devices_share_one_cpu():
  devices = jax.devices('cpu')
  one = hardware.peak(devices[:1])
  all_of_them = hardware.peak(devices)
  assert 1e8 < one.flops_per_s < 1e15
  # Both are measurements of the same cores.
  assert all_of_them.flops_per_s < 4 * one.flops_per_s
  assert 'measured' in one.source
