"""A checkpoint opened leaf by leaf, of which any rectangle can be read.

Orbax reads whole leaves or the shards of a sharding. Below it every leaf is a
zarr array in an OCDBT store, which TensorStore reads by rectangle. The least
that it reads is a chunk: a shard of the mesh that saved the leaf.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import os
from typing import Any

import numpy as np
import tensorstore as ts

from jaxtrain.checkpoints import abstract
from jaxtrain.checkpoints import orbax_io
from jaxtrain.checkpoints import views
from jaxtrain.models import config_json
from jaxtrain.models.config import ModelConfig

# Chunks kept for the next rectangle that cuts them.
_CACHE_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """An open checkpoint.

  Attributes:
    where: What errors call it.
    step: Its number.
    leaves: Its arrays by '/'-joined path, none of them read.
    tree: Its containers, with something in place of each leaf.
    config: Architecture, if it was saved with one.
    metadata: As `CheckpointManager.save` was given them.
    read_data_state: Reads that of this process, while the checkpoint is open;
      raises ValueError where it is another's.
  """

  where: str
  step: int
  leaves: Mapping[str, views.View]
  tree: Any
  config: ModelConfig | None
  metadata: dict[str, Any]
  read_data_state: Callable[[], Any]


@contextlib.contextmanager
def open_checkpoint(
  directory: str | os.PathLike, step: int | None = None
) -> Iterator[Checkpoint]:
  """Opens one checkpoint of a run's folder; reads no array.

  Args:
    directory: What `CheckpointManager` was given.
    step: Which; `None` is the latest.

  Yields:
    The checkpoint.

  Raises:
    ValueError: There is none, or it is unfinished or damaged.
  """
  with orbax_io.open_folder(directory, create=False) as manager:
    step = orbax_io.pick(manager, step)
    tree = orbax_io.stored_tree(manager, step)
    meta = orbax_io.read_meta(manager, step)
    config = meta['config']
    where = f'checkpoint step {step} in {manager.directory}'
    context = ts.Context({'cache_pool': {'total_bytes_limit': _CACHE_BYTES}})
    yield Checkpoint(
      where=where,
      step=step,
      leaves={
        name: _view(where, name, leaf, context)
        for name, leaf in abstract.leaves(tree).items()
      },
      tree=tree,
      config=None if config is None else config_json.from_json(config),
      metadata=meta['metadata'],
      read_data_state=lambda: orbax_io.read_data_state(manager, step),
    )


def _view(where, name, leaf, context):
  if not hasattr(leaf, 'shape') or leaf.dtype is None:
    raise ValueError(f'{where}: {name} is no array')
  opened = []

  def fetch(index):
    try:
      if not opened:
        opened.append(_open(leaf, context))
      return np.asarray(opened[0][index].read().result())
    except (OSError, ValueError) as e:
      reason = str(e).partition('\n')[0][:300]
      raise ValueError(f'{where}: {name} cannot be read ({reason})') from e

  return views.Stored(name, tuple(leaf.shape), np.dtype(leaf.dtype), fetch)


def _open(leaf, context):
  folder = os.fspath(leaf.directory)
  base = folder if '://' in folder else f'file://{folder}'
  store = {'driver': 'ocdbt', 'base': f'{base}/', 'path': f'{leaf.name}/'}
  spec = {
    'driver': 'zarr',
    'kvstore': store,
    'recheck_cached_data': 'open',
    'recheck_cached_metadata': 'open',
  }
  return ts.open(spec, read=True, open=True, context=context).result()
