"""Reads GGUF files: metadata at once, tensors by row, dequantised on the way.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2
and 3, little-endian. The `gguf` library knows the types and dequantises; its
reader makes a NumPy array of every string, 10 s for Gemma's vocabulary, so
the metadata are parsed here (0.3 s).
"""

import functools
import math
import mmap
import os
import struct
from typing import Any, NamedTuple

import gguf
from gguf import quants
import numpy as np

_Kind = gguf.GGUFValueType
_SCALARS = {
  _Kind.UINT8: '<u1',
  _Kind.INT8: '<i1',
  _Kind.UINT16: '<u2',
  _Kind.INT16: '<i2',
  _Kind.UINT32: '<u4',
  _Kind.INT32: '<i4',
  _Kind.FLOAT32: '<f4',
  _Kind.UINT64: '<u8',
  _Kind.INT64: '<i8',
  _Kind.FLOAT64: '<f8',
  _Kind.BOOL: '?',
}
# Rows dequantised at a time: bounds the temporaries of the `gguf` library.
_CHUNK_BYTES = 64 << 20


class _Tensor(NamedTuple):
  shape: tuple[int, ...]
  kind: gguf.GGMLQuantizationType
  data: np.ndarray  # uint8 [rows, bytes of a row], mapped.


class GGUFFile:
  """`Source` of a GGUF file.

  Attributes:
    where: Path.
    fields: Metadata: numbers, strings, lists of strings, arrays of numbers.
    shapes: Shape of every tensor, slowest dimension first.
  """

  def __init__(self, path: str | os.PathLike):
    """Maps the file and reads its metadata.

    Raises:
      ValueError: The file is missing, truncated or no GGUF file.
    """
    self.where = str(path)
    try:
      with open(path, 'rb') as f:
        self._bytes = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as e:  # ValueError: an empty file.
      raise ValueError(f'{path} cannot be read: {e}') from e
    self._at = 0
    self.fields: dict[str, Any] = {}
    self._tensors: dict[str, _Tensor] = {}
    try:
      self._parse()
    except (struct.error, IndexError, UnicodeDecodeError, MemoryError) as e:
      raise ValueError(
        f'{path} is truncated or malformed at byte {self._at}'
      ) from e
    self.shapes = {n: t.shape for n, t in self._tensors.items()}

  def get(self, key: str, default: Any = None) -> Any:
    """A metadata value."""
    return self.fields.get(key, default)

  def dtype(self, name: str) -> np.dtype:
    """float32, which all are dequantised to."""
    del name
    return np.dtype(np.float32)

  def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """Dequantises a rectangle of a tensor, whole rows at a time."""
    t = self._tensors[name]
    starts = [range(*s.indices(n)) for s, n in zip(index, t.shape, strict=True)]
    out = np.empty([len(r) for r in starts], np.float32)
    rows = np.arange(t.data.shape[0]).reshape(t.shape[:-1])[index[:-1]]
    flat, rows = out.reshape(-1, out.shape[-1]), rows.reshape(-1)
    step = max(1, _CHUNK_BYTES // (4 * t.shape[-1]))
    for i in range(0, len(rows), step):
      data = t.data[rows[i : i + step]]
      flat[i : i + step] = _dequantize(data, t.kind)[:, index[-1]]
    return out

  def _parse(self):
    magic, version = self._unpack('<4sI')
    if magic != b'GGUF' or version not in (2, 3):
      raise ValueError(
        f'{self.where} is not a little-endian GGUF file of version 2 or 3'
      )
    num_tensors, num_fields = self._unpack('<QQ')
    for _ in range(num_fields):
      key = self._string()
      self.fields[key] = self._value(*self._unpack('<I'))
    infos = [self._tensor_info() for _ in range(num_tensors)]
    alignment = self.fields.get('general.alignment', 32)
    start = -(-self._at // alignment) * alignment
    for name, shape, kind, offset in infos:
      self._tensors[name] = self._map(name, shape, kind, start + offset)

  def _tensor_info(self):
    name = self._string()
    (num_dims,) = self._unpack('<I')
    shape = self._unpack(f'<{num_dims}Q')[::-1]
    kind, offset = self._unpack('<IQ')
    try:
      return name, shape, gguf.GGMLQuantizationType(kind), offset
    except ValueError as e:
      raise ValueError(f'{self.where}: {name} has unknown type {kind}') from e

  def _map(self, name, shape, kind, start):
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    row_bytes = shape[-1] // block * block_bytes
    num_rows = math.prod(shape[:-1])
    if start + num_rows * row_bytes > len(self._bytes):
      raise ValueError(
        f'{self.where} is truncated: {name} ends at byte '
        f'{start + num_rows * row_bytes}, the file at {len(self._bytes)}'
      )
    data = np.frombuffer(self._bytes, np.uint8, num_rows * row_bytes, start)
    return _Tensor(shape, kind, data.reshape(num_rows, row_bytes))

  def _unpack(self, form):
    values = struct.unpack_from(form, self._bytes, self._at)
    self._at += struct.calcsize(form)
    return values

  def _string(self):
    (size,) = self._unpack('<Q')
    end = self._at + size
    if end > len(self._bytes):
      raise IndexError(end)
    text = self._bytes[self._at : end].decode('utf-8')
    self._at = end
    return text

  def _value(self, kind):
    if kind == _Kind.STRING:
      return self._string()
    if kind == _Kind.ARRAY:
      item, size = self._unpack('<IQ')
      if item in _SCALARS:
        return self._numbers(item, size)
      return [self._value(item) for _ in range(size)]
    if kind not in _SCALARS:
      raise ValueError(f'{self.where}: unknown metadata type {kind}')
    return self._numbers(kind, 1)[0].item()

  def _numbers(self, kind, size):
    dtype = np.dtype(_SCALARS[kind])
    end = self._at + size * dtype.itemsize
    if end > len(self._bytes):
      raise IndexError(end)
    values = np.frombuffer(self._bytes, dtype, size, self._at)
    self._at = end
    return values


def _dequantize(data, kind):
  try:
    return quants.dequantize(data, kind)
  except NotImplementedError as e:
    raise ValueError(f'GGUF type {kind.name} cannot be dequantised') from e


def open_gguf(path: str | os.PathLike) -> GGUFFile:
  """`GGUFFile(path)`, parsed once for the weights and the tokenizer."""
  try:
    stat = os.stat(path)
  except OSError as e:
    raise ValueError(f'{path} cannot be read: {e}') from e
  return _open(os.fspath(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _open(path, size, modified_ns):
  del size, modified_ns  # A changed file is read again.
  return GGUFFile(path)
