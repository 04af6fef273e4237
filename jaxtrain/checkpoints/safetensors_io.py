"""Safetensors directories: read any rectangle, write tensor by tensor.

Format: https://huggingface.co/docs/safetensors (an 8-byte length, a JSON
header, the data). Reading goes through the `safetensors` library; it has no
writer that takes one tensor at a time, so the few lines of that are here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import json
import os
import pathlib
import struct
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
_DTYPES = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(jnp.bfloat16),
}


class SafetensorsSource:
  """`Source` of a directory with one or several safetensors files."""

  def __init__(
    self,
    path: str | os.PathLike,
    tensor_name: Callable[[str], str | None] = lambda name: name,
  ):
    """Opens a directory and reads the headers, no tensor.

    Args:
      path: Directory with model.safetensors, or with
        model.safetensors.index.json and the files it names.
      tensor_name: Our spelling of a tensor's name; `None` hides the tensor.

    Raises:
      ValueError: A missing, truncated or malformed file, by name.
    """
    path = pathlib.Path(path)
    self.where = str(path)
    self.shapes: dict[str, tuple[int, ...]] = {}
    self._slices: dict[str, Any] = {}
    for file, names in _files(path).items():
      opened = _open(file)
      present = set(opened.keys())
      if names is not None and (absent := sorted(names - present)):
        raise ValueError(
          f'{file}: {INDEX} places {absent[0]!r} and {len(absent) - 1} more '
          'here, but they are not in it'
        )
      for name in sorted(present if names is None else names):
        ours = tensor_name(name)
        if ours is None:
          continue
        self._slices[ours] = opened.get_slice(name)
        self.shapes[ours] = tuple(self._slices[ours].get_shape())

  def dtype(self, name: str) -> np.dtype:
    """Dtype the tensor is stored in.

    Raises:
      ValueError: It is not a floating-point one of 16 bits or more.
    """
    stored = self._slices[name].get_dtype()
    if stored not in _DTYPES:
      raise ValueError(
        f'{self.where}: {name} is stored as {stored}; supported: '
        f'{", ".join(_DTYPES)}'
      )
    return _DTYPES[stored]

  def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """Reads a rectangle of a tensor."""
    self.dtype(name)
    return self._slices[name][index]

  def hide(self, name: str) -> None:
    """Takes a tensor out of `shapes`."""
    del self.shapes[name]


def write_shard(
  file: pathlib.Path,
  entries: Sequence[tuple[str, tuple[int, ...], np.dtype]],
  arrays: Iterable[np.ndarray],
) -> None:
  """Writes one safetensors file, holding one tensor at a time.

  Args:
    file: Where; an existing file is replaced.
    entries: Name, shape and dtype of every tensor.
    arrays: The tensors in the same order.
  """
  kinds = {dtype: kind for kind, dtype in _DTYPES.items()}
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for name, shape, dtype in entries:
    start, end = end, end + num_bytes(shape, dtype)
    header[name] = dict(
      dtype=kinds[dtype], shape=list(shape), data_offsets=[start, end]
    )
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # The data starts aligned.
  with open(file, 'wb') as f:
    f.write(struct.pack('<Q', len(text)) + text)
    for (name, shape, dtype), x in zip(entries, arrays, strict=True):
      assert (x.shape, x.dtype) == (shape, dtype), (name, x.shape, x.dtype)
      f.write(np.ascontiguousarray(x).view(np.uint8).data)
    f.flush()
    os.fsync(f.fileno())


def supports(dtype: np.dtype) -> bool:
  """Whether parameters of this dtype can be written."""
  return dtype in _DTYPES.values()


def num_bytes(shape: Sequence[int], dtype: np.dtype) -> int:
  """Bytes of a tensor."""
  return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def read_json(file: pathlib.Path) -> Mapping[str, Any]:
  """Reads a JSON object.

  Raises:
    ValueError: The file is missing or is not a JSON object.
  """
  try:
    value = json.loads(file.read_text('utf-8'))
  except FileNotFoundError as e:
    raise ValueError(f'{file} is missing') from e
  except ValueError as e:
    raise ValueError(f'{file} is not JSON: {e}') from e
  if not isinstance(value, dict):
    raise ValueError(f'{file} is not a JSON object')
  return value


def _files(path):
  """`{file: names in it}`, names `None` for all."""
  if (path / INDEX).is_file():
    weight_map = read_json(path / INDEX).get('weight_map')
    if not isinstance(weight_map, dict) or not weight_map:
      raise ValueError(f'{path / INDEX} has no weight_map')
    files = {}
    for name, file in weight_map.items():
      if pathlib.PurePath(str(file)).name != file:
        raise ValueError(f'{path / INDEX}: {file!r} is not a file beside it')
      files.setdefault(path / file, set()).add(name)
    return files
  if (path / SINGLE).is_file():
    return {path / SINGLE: None}
  others = sorted(p.name for p in path.glob('*.safetensors'))
  others += sorted(p.name for p in path.glob('pytorch_model*.bin'))
  found = f'; there is {", ".join(others)}' if others else ''
  raise ValueError(f'{path} has neither {SINGLE} nor {INDEX}{found}')


def _open(file):
  try:
    return safetensors.safe_open(str(file), framework='numpy')
  except (FileNotFoundError, IsADirectoryError) as e:
    raise ValueError(f'{file} is missing') from e
  except (safetensors.SafetensorError, OSError) as e:
    raise ValueError(
      f'{file} is truncated or is not a safetensors file: {e}'
    ) from e
