"""Puts a kernel's operands into memory, with their values where known."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import re

import numpy as np

from pallas_kernels.tpu_compiler.chips import Chip
from pallas_kernels.tpu_compiler.hlo import Layout
from pallas_kernels.tpu_compiler.listing import Listing
from pallas_kernels.tpu_compiler.listing import Operand
from pallas_kernels.tpu_compiler.operands import PallasOperands
from pallas_kernels.tpu_compiler.program import VMEM_UNIT
from pallas_kernels.tpu_compiler.values import MASK
from pallas_kernels.tpu_compiler.values import ScheduleError
from pallas_kernels.tpu_compiler.values import Unknown

_BY_VALUE = '<no memory space>'
_FIRST_BYTE = 1 << 20
_MAX_GRANULE = 0x7FFFFFFF
_PADDED_UP_TO = 1 << 30
_HLO_DTYPES = {
  'bfloat16': 'bf16',
  'bool': 'pred',
  'float16': 'f16',
  'float32': 'f32',
  'float8_e4m3fn': 'f8e4m3fn',
  'float8_e5m2': 'f8e5m2',
  'int16': 's16',
  'int32': 's32',
  'int4': 's4',
  'int8': 's8',
  'uint16': 'u16',
  'uint32': 'u32',
  'uint4': 'u4',
  'uint8': 'u8',
}


@dataclasses.dataclass(frozen=True)
class Region:
  """Memory of one operand.

  Attributes:
    operand: Which.
    start: Its first byte.
    size: Bytes, padding included.
    words: What it holds, or `None` where nobody knows.
  """

  operand: Operand
  start: int
  size: int
  words: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where everything is when a kernel starts.

  Attributes:
    pointers: Address or value of each operand, by its name in the listing.
    regions: By memory space.
    smem: Words of scalar memory.
    core: Number of the core.
  """

  pointers: dict[str, int | Unknown]
  regions: dict[str, list[Region]]
  smem: dict[int, int]
  core: int

  def find(self, space: str, byte: int) -> Region | None:
    """The operand that holds a byte."""
    for region in self.regions[space]:
      if region.start <= byte < region.start + region.size:
        return region
    return None


def known_operands(
  listing: Listing, recorded: Sequence[PallasOperands]
) -> dict[int, np.ndarray]:
  """Values of a kernel's operands as the trace recorded them, by index.

  Where several calls could be this kernel, only what those that know an operand
  agree on is known.
  """
  wanted = {o.index: o.shape for o in listing.operands if o.is_input}
  exact, near = [], []
  for call in recorded:
    shapes = [_hlo_shape(shape, dtype) for shape, dtype in call.shapes]
    if not wanted or len(shapes) <= max(wanted):
      continue
    agreeing = sum(shapes[i] == shape for i, shape in wanted.items())
    if agreeing == len(wanted):
      exact.append(call)
    # The sizes of a dynamic grid have other shapes when they are passed.
    elif len(shapes) == max(wanted) + 1 and agreeing >= max(1, len(wanted) - 2):
      near.append(call)
  own = re.sub(r'\.\d+$', '', listing.name)
  found = exact or near[:1]
  found = [c for c in found if c.name.split(' ')[0] == own] or found
  values = {}
  for i in range(max((len(call.values) for call in found), default=0)):
    known = [call.values[i] for call in found if i < len(call.values)]
    known = [value for value in known if value is not None]
    if known and all(np.array_equal(known[0], other) for other in known):
      values[i] = known[0]
  return values


def place(
  listing: Listing,
  chip: Chip,
  values: Mapping[int, np.ndarray],
  layouts: Mapping[int, Layout],
  core: int,
) -> Placement:
  """Lays the operands out one after the other.

  Args:
    listing: The kernel.
    chip: Gives the units of addresses.
    values: Known inputs, by index.
    layouts: How inputs lie in memory, by index.
    core: Number of the core that runs it.

  Raises:
    ScheduleError: They do not fit into the address space.
  """
  units = {'hbm': chip.hbm_unit, 'vmem': VMEM_UNIT, 'smem': 4}
  free = dict.fromkeys(units, _FIRST_BYTE)
  placement = Placement({}, {space: [] for space in units}, {}, core)
  for operand in listing.operands:
    value = values.get(operand.index) if operand.is_input else None
    if operand.space == _BY_VALUE:
      placement.pointers[operand.result] = (
        Unknown(f'operand {operand.index}, {operand.shape}, passed by value')
        if value is None
        else int(np.asarray(value).reshape(-1)[0]) & MASK
      )
      continue
    if operand.space not in units:
      raise ScheduleError(f'{listing.name}: in unknown memory: {operand}')
    start, size = free[operand.space], _padded_bytes(operand.shape)
    free[operand.space] += size
    words = None
    if value is not None:
      words = memory_image(np.asarray(value), layouts.get(operand.index))
    placement.regions[operand.space].append(Region(operand, start, size, words))
    placement.pointers[operand.result] = start // units[operand.space]
    if operand.space == 'smem' and words is not None:
      placement.smem.update(enumerate(words.tolist(), start // 4))
  if free['hbm'] // 32 > _MAX_GRANULE:
    raise ScheduleError(f'{listing.name}: operands exceed the address space')
  _set_constants(placement.smem, listing, core)
  return placement


def memory_image(value: np.ndarray, layout: Layout | None) -> np.ndarray | None:
  """32-bit words of an array as it lies in memory; `None`: of no such type."""
  if value.dtype == np.bool_:
    value = value.view(np.uint8)
  unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}.get(value.dtype.itemsize)
  if unsigned is None:
    return None
  a = np.ascontiguousarray(value).view(unsigned)
  if layout is not None and a.ndim:
    a = a.transpose(layout.minor_to_major[::-1])
    for tile in layout.tiles:
      a = _tiled(a, tile)
  data = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
  return np.pad(data, (0, -data.size % 4)).view(np.uint32)


def _tiled(a, tile):
  """Splits the last dimensions into tiles, which become the last ones."""
  n = len(tile)
  a = a.reshape((1,) * (n - a.ndim) + a.shape)
  lead = a.ndim - n
  padding = [(0, -s % t) for s, t in zip(a.shape[lead:], tile, strict=True)]
  a = np.pad(a, [(0, 0)] * lead + padding)
  split = [
    x for s, t in zip(a.shape[lead:], tile, strict=True) for x in (s // t, t)
  ]
  a = a.reshape(*a.shape[:lead], *split)
  outer = [lead + 2 * k for k in range(n)]
  return a.transpose(*range(lead), *outer, *(k + 1 for k in outer))


def _padded_bytes(shape):
  """Bytes of an operand, with room for the padding of any tiling."""
  match = re.match(r'([a-z]+)(\d*)\w*\[([\d,]*)\]', shape)
  bits = 8 if match[1] == 'pred' else max(int(match[2]), 8)
  sizes = [int(x) for x in match[3].split(',') if x]
  padded = sizes or [1]
  padded = [*padded[:-1], -(-padded[-1] // 128) * 128]
  if len(padded) > 1:
    padded[-2] = -(-padded[-2] // 32) * 32
  size = math.prod(padded) * bits // 8
  if size > _PADDED_UP_TO:
    size = min(size, int(1.25 * math.prod(sizes) * bits // 8))
  return (-(-size // 4096) + 1) * 4096


def _set_constants(smem, listing, core):
  for allocation in listing.allocations.values():
    if allocation.space == 'smem' and allocation.is_absolute:
      word = allocation.offset // 4
      if 'core index' in allocation.tag:
        smem[word] = core
      elif 'null pointer' in allocation.tag or 'chip ID' in allocation.tag:
        smem.setdefault(word, 0)


def _hlo_shape(shape, dtype):
  return f'{_HLO_DTYPES.get(dtype, dtype)}[{",".join(map(str, shape))}]'
