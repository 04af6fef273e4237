"""Saves that copy and write while training goes on.

DataStates-LLM (Maurya et al., https://arxiv.org/abs/2406.10707), on orbax: the
state is copied to the host between two updates (`staging.py`), and a thread
gives the copies to orbax, group by group. What is on disk is what orbax writes
otherwise, without compression, which costs more time than it saves on a disk.

Several processes: orbax's barriers must not be programs of the devices, which
the thread would start in another order on every process; see
`orbax_io.open_folder`.
"""

from collections.abc import Callable
import dataclasses
import logging
import threading
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxtrain.checkpoints.staging import Group
from jaxtrain.checkpoints.staging import Staging
from jaxtrain.sharding.partition import path_name

_log = logging.getLogger(__name__)
SAVING = ('async', 'lazy')


class LazyWriter:
  """Writes one state after the other from a thread of its own.

  Args:
    staging_gib: Host memory of this process for copies; `None` is half of what
      the host has free now, too much if several processes share it. Where NumPy
      cannot read pinned memory in place, orbax's copy of the group that it
      writes comes on top.

  Attributes:
    blocked_s: Seconds that callers of `save` and `wait_copied` have waited.

  Raises:
    ValueError: `staging_gib` is not positive.
  """

  def __init__(self, staging_gib: float | None = None):
    if staging_gib is not None and staging_gib <= 0:
      raise ValueError(f'staging_gib={staging_gib} must be positive')
    budget = None if staging_gib is None else max(int(staging_gib * 2**30), 1)
    self.staging = Staging(budget)
    self.blocked_s = 0.0
    self._flushes: list[threading.Thread] = []  # One at work, one waiting.
    self._error: BaseException | None = None

  def options(self) -> dict[str, Any]:
    """Of orbax's handler of the trees that `save` passes to `write`."""
    registry = ocp.type_handlers.create_type_handler_registry(
      (_Leaf, _StagedArrays(self.staging)),
      *(
        (kind, ocp.type_handlers.get_type_handler(kind))
        for kind in ocp.type_handlers.supported_types()
      ),
    )
    return dict(use_compression=False, type_handler_registry=registry)

  def save(
    self,
    state: Any,
    write: Callable[[Any], None],
    *,
    given_up: Callable[[], None] = lambda: None,
  ) -> None:
    """Begins to copy, and lets a thread write what is copied.

    Waits if two saves are unfinished already. The arrays may be donated after
    `wait_copied`.

    Args:
      state: Pytree of arrays, without random keys.
      write: Writes a tree of the structure of `state` with `options`; run on
        the thread.
      given_up: Called on the thread if nothing was written.

    Raises:
      ValueError: A leaf is above the budget.
      Exception: What stopped an earlier save.
    """
    began = time.perf_counter()
    self.wait_copied()
    while len(self._alive()) > 1:
      self._flushes[0].join()
    self.raise_error()
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    arrays = [(path_name(p), x) for p, x in leaves if isinstance(x, jax.Array)]
    groups = self.staging.start(arrays)
    places = iter([(g, i) for g in groups for i in range(g.num_leaves)])
    tree = jax.tree.unflatten(
      structure,
      [
        _Leaf(x.shape, x.dtype, *next(places))
        if isinstance(x, jax.Array)
        else _kept(x)
        for _, x in leaves
      ],
    )
    previous = self._flushes[-1:]
    thread = threading.Thread(
      target=self._flush,
      args=(previous, groups, tree, write, given_up),
      name='lazy_save',
    )
    self._flushes.append(thread)
    thread.start()
    self.blocked_s += time.perf_counter() - began

  def wait_copied(self) -> None:
    """Waits until the arrays of the last save may be donated."""
    waited = self.staging.wait_copied()
    self.blocked_s += waited
    if waited > 1:
      _log.warning(
        'Waited %.1f s for staging memory (%.3g GiB): the disk is slower than '
        'the steps between two saves',
        waited,
        self.staging.budget_bytes / 2**30,
      )

  def wait(self) -> None:
    """Waits until everything is written; raises what went wrong."""
    for thread in self._alive():
      thread.join()
    self.raise_error()

  def raise_error(self) -> None:
    """Raises what stopped a save, once."""
    error, self._error = self._error, None
    if error is not None:
      raise error

  def _alive(self):
    self._flushes = [t for t in self._flushes if t.is_alive()]
    return self._flushes

  def _flush(self, previous, groups, tree, write, given_up):
    for thread in previous:
      thread.join()
    try:
      write(tree)
    except BaseException as e:  # Of a thread: nobody else would see it.
      given_up()
      # The first is the cause; those after it may follow from it.
      self._error = self._error or e
    finally:
      for group in groups:
        self.staging.release(group)


@dataclasses.dataclass(frozen=True, eq=False)
class _Leaf:
  """Stands for an array that is copied when orbax comes to it."""

  shape: tuple[int, ...]
  dtype: Any
  group: Group
  index: int


class _StagedArrays(ocp.type_handlers.TypeHandler):
  """Writes arrays as orbax does, once they are copied, and frees the copies."""

  def __init__(self, staging: Staging):
    self._staging = staging
    self._arrays = ocp.type_handlers.get_type_handler(jax.Array)

  def typestr(self):
    return self._arrays.typestr()

  async def serialize(self, values, infos, args=None):
    args = args or [ocp.SaveArgs()] * len(values)
    by_group = {}
    for value, info, arg in zip(values, infos, args, strict=True):
      by_group.setdefault(value.group, []).append((value.index, info, arg))
    for group, members in by_group.items():
      copies = self._staging.take(group)
      indices, group_infos, group_args = zip(*members, strict=True)
      for future in await self._arrays.serialize(
        [copies[i] for i in indices], group_infos, group_args
      ):
        future.result()
      del copies, future
      self._staging.release(group)
    return []

  async def deserialize(self, infos, args=None):
    return await self._arrays.deserialize(infos, args)

  async def metadata(self, infos):
    return await self._arrays.metadata(infos)


def _kept(leaf):
  # NumPy arrays may be changed by their owner meanwhile.
  return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def check_saving(saving: str, staging_gib: float | None) -> None:
  """Checks how to save.

  Raises:
    ValueError: See `manager.CheckpointManager`.
  """
  if saving not in SAVING:
    raise ValueError(
      f'saving={saving!r} is not known; allowed: {", ".join(SAVING)}'
    )
  if staging_gib is not None and saving != 'lazy':
    raise ValueError(
      f"staging_gib={staging_gib} is of saving='lazy', not of {saving!r}"
    )
