"""Hugging Face directories out: config.json and safetensors.

`transformers` loads them. They are written beside the target and renamed, so
that a directory with the wanted name is always whole.
"""

import functools
import json
import os
import pathlib
import shutil
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import tqdm

from jaxtrain.checkpoints import layout
from jaxtrain.checkpoints import params as params_lib
from jaxtrain.checkpoints import safetensors_io
from jaxtrain.models import families
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.families import base

_TOKENIZER_FILES = (
  'tokenizer.json',
  'tokenizer.model',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'merges.txt',
  'chat_template.jinja',
  'generation_config.json',
)
_TOKEN_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')


def save_huggingface(
  path: str | os.PathLike,
  config: ModelConfig,
  params: Any,
  max_shard_bytes: int = 5_000_000_000,
  tokenizer_from: str | os.PathLike | None = None,
) -> None:
  """Writes a model as a directory that `transformers` loads.

  Everything is written to `.<name>.partial` beside it and renamed at the end.
  Under `jax.distributed` all processes must call this; the first one writes.

  Args:
    path: The new directory; it may exist if it is empty.
    config: Architecture.
    params: Parameters, sharded in any way, unboxed.
    max_shard_bytes: Largest safetensors file; a larger tensor has its own.
    tokenizer_from: Directory whose tokenizer files and token ids are taken
      over.

  Raises:
    ValueError: The directory is not empty, the family cannot express the
      config, or a parameter is missing, extra or misshapen.
  """
  path = pathlib.Path(path)
  if not _is_free(path):
    raise ValueError(f'{path} exists and is not an empty directory')
  if max_shard_bytes < 1:
    raise ValueError(f'max_shard_bytes={max_shard_bytes} must be at least 1')
  family = families.get(config.family)
  config_json = family.config_to_hf(config)
  tensors = _plan(config, family, params)
  config_json['torch_dtype'] = str(tensors[0].array.dtype)
  config_json |= _token_ids(tokenizer_from)
  tokenizer_files = _tokenizer_files(tokenizer_from)
  files = _shard(tensors, max_shard_bytes)

  partial = path.parent / f'.{path.name}.partial'
  is_writer = jax.process_index() == 0
  try:
    if is_writer:
      path.parent.mkdir(parents=True, exist_ok=True)
      shutil.rmtree(partial, ignore_errors=True)
      partial.mkdir()
      _write_index(partial, files)
      for file in tokenizer_files:
        shutil.copyfile(file, partial / file.name)
    _write_tensors(partial, files, is_writer)
    if is_writer:
      _write_json(partial / 'config.json', config_json)
      partial.replace(path)
  except BaseException:
    if is_writer:
      shutil.rmtree(partial, ignore_errors=True)
    raise
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f'save_huggingface {path}')


def _is_free(path):
  """Whether nothing is there, as the first process sees it."""
  is_free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
  if jax.process_count() > 1:
    # Another process may look when the first one has already finished.
    is_free = multihost_utils.broadcast_one_to_all(np.int32(is_free))
  return bool(is_free)


class _Tensor:
  """One tensor to write: a place in a parameter."""

  def __init__(self, name, array, place, weight):
    self.name, self.array = name, array
    self.place, self.weight = place, weight
    sizes = dict(zip(weight.ours.split(), array.shape, strict=True))
    self.shape = layout.stored_shape(weight, sizes)
    self.bytes = safetensors_io.num_bytes(self.shape, array.dtype)

  def entry(self):
    return self.name, self.shape, np.dtype(self.array.dtype)

  def fetch(self):
    """Brings just this tensor to the host; a collective."""
    piece = self.array
    if isinstance(piece, jax.Array):
      piece = _fetch(piece, self.place)
    else:
      piece = np.asarray(piece[self.place])
    return layout.to_stored(self.weight, piece)


def _fetch(array, place):
  if not place and array.is_fully_addressable:
    return np.asarray(array)
  out = array.sharding
  if isinstance(out, NamedSharding):
    # What this process sees of it stays in shards; else it must see it all.
    rest = out.spec[len(place) :] if array.is_fully_addressable else ()
    out = NamedSharding(out.mesh, PartitionSpec(*rest))
  one = _picker(out)(array, tuple(jnp.int32(i) for i in place))
  return np.asarray(
    one if one.is_fully_addressable else one.addressable_data(0)
  )


@functools.cache
def _picker(sharding):
  return jax.jit(lambda x, place: x[place], out_shardings=sharding)


def _plan(config, family, params):
  """All tensors in the order they are written: by layer."""
  flat = {
    params_lib.path_name(p): leaf
    for p, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
  }
  weight_map = family.weights(config)
  sizes = base.dim_sizes(config)
  if flat.keys() != weight_map.keys():
    raise ValueError(
      'params do not fit the config: missing '
      f'{sorted(weight_map.keys() - flat.keys())}, extra '
      f'{sorted(flat.keys() - weight_map.keys())}'
    )
  tensors = []
  for path, (weight, *_) in weight_map.items():
    want = layout.param_shape(weight, sizes)
    if flat[path].shape != want:
      raise ValueError(f'params: {path} is {flat[path].shape}, wanted {want}')
    if not safetensors_io.supports(np.dtype(flat[path].dtype)):
      raise ValueError(f'params: {path} is {flat[path].dtype}, not a float')
    for place, name in layout.stored_names(weight, sizes):
      tensors.append(_Tensor(name, flat[path], place, weight))
  return sorted(tensors, key=lambda t: t.place[:1])


def _shard(tensors, max_shard_bytes):
  """`{file name: tensors}`."""
  groups, used = [[]], 0
  for t in tensors:
    if groups[-1] and used + t.bytes > max_shard_bytes:
      groups.append([])
      used = 0
    groups[-1].append(t)
    used += t.bytes
  if len(groups) == 1:
    return {safetensors_io.SINGLE: groups[0]}
  return {
    f'model-{i + 1:05d}-of-{len(groups):05d}.safetensors': group
    for i, group in enumerate(groups)
  }


def _write_tensors(directory, files, is_writer):
  total = sum(t.bytes for group in files.values() for t in group)
  with tqdm.tqdm(
    desc='Exporting',
    total=total,
    unit='B',
    unit_scale=True,
    disable=total < params_lib.PROGRESS_BYTES or not is_writer,
  ) as progress:

    def fetch(group):
      for t in group:
        yield t.fetch()
        progress.update(t.bytes)

    for file, group in files.items():
      if is_writer:
        entries = [t.entry() for t in group]
        safetensors_io.write_shard(directory / file, entries, fetch(group))
      else:
        for _ in fetch(group):
          pass


def _write_index(directory, files):
  if len(files) == 1:
    return
  total = sum(t.bytes for group in files.values() for t in group)
  weight_map = {t.name: f for f, group in files.items() for t in group}
  _write_json(
    directory / safetensors_io.INDEX,
    {'metadata': {'total_size': total}, 'weight_map': weight_map},
  )


def _write_json(file, value):
  file.write_text(json.dumps(value, indent=2) + '\n', 'utf-8')


def _token_ids(tokenizer_from):
  """Token ids of the model that the tokenizer came with; else unknown."""
  ids = dict.fromkeys(_TOKEN_IDS)
  if tokenizer_from is not None:
    file = pathlib.Path(tokenizer_from) / 'config.json'
    found = safetensors_io.read_json(file) if file.is_file() else {}
    ids |= {k: found[k] for k in _TOKEN_IDS if k in found}
  return ids


def _tokenizer_files(tokenizer_from):
  if tokenizer_from is None:
    return []
  files = [pathlib.Path(tokenizer_from) / name for name in _TOKENIZER_FILES]
  files = [file for file in files if file.is_file()]
  if not files:
    raise ValueError(f'tokenizer_from={tokenizer_from} has no tokenizer files')
  return files
