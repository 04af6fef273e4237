"""WGMMA as the hardware does it, in JAX's interpreter of GPU kernels.

The interpreter of JAX 0.12 multiplies at once, takes no factor from registers,
and does not look for races with what a WGMMA reads. Within `async_wgmma` a
product is made as late as the kernel allows: when it waits for it. So a buffer
that is given back before that shows as a race, or as a wrong result.
"""

import collections
import contextlib

import jax
import numpy as np


@contextlib.contextmanager
def async_wgmma():
  """Replaces the interpreter's WGMMA."""
  from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

  products = _Products(gpu_callbacks)
  names = 'wgmma', 'wgmma_accumulator_deref'
  before = {name: getattr(gpu_callbacks, name) for name in names}
  gpu_callbacks.wgmma = gpu_callbacks.fail_on_exception(products.issue)

  def deref(*, thread, wait_n, **kwargs):
    products.wait(thread, wait_n)
    name = 'wgmma_accumulator_deref'
    return before[name](thread=thread, wait_n=wait_n, **kwargs)

  gpu_callbacks.wgmma_accumulator_deref = gpu_callbacks.fail_on_exception(deref)
  try:
    yield
  finally:
    for name, function in before.items():
      setattr(gpu_callbacks, name, function)


class _Products:
  """Products that were issued and not waited for, of each warpgroup."""

  def __init__(self, callbacks):
    self.callbacks = callbacks
    self.pending = collections.defaultdict(list)

  def issue(self, *, token, mesh_location, thread, source_info=None, **refs):
    """Takes what the interpreter's `wgmma` does: keys, and transforms."""
    where = mesh_location, thread, source_info
    self.pending[thread].append((where, refs))
    return token

  def wait(self, thread, most):
    """Until no more than `most` are under way; `None` does not wait."""
    pending = self.pending[thread]
    while most is not None and len(pending) > most:
      self._multiply(*pending.pop(0))

  def _multiply(self, where, refs):
    a, b, acc = (
      self._read(where, *self._operand(refs, name))
      for name in ('a', 'b', 'acc')
    )
    key, transforms = self._operand(refs, 'acc')
    self.callbacks._get_shared_memory().store_buffer_content(
      *self._access(key, transforms),
      acc + np.matmul(np.asarray(a, acc.dtype), np.asarray(b, acc.dtype)),
      where[1],
      logging_info=self.callbacks.memory.GPULoggingInfo(*where),
    )

  def _operand(self, refs, name):
    return refs[f'{name}_allocation_key_as_array'], refs[f'{name}_transforms']

  def _access(self, key, transforms):
    callbacks = self.callbacks
    key = callbacks.HostAllocationKey.from_array(key)
    transforms = jax.tree.map(
      int, callbacks._remove_noop_transforms(transforms)
    )
    return key, callbacks._get_shared_memory().access(key, transforms)

  def _read(self, where, key, transforms):
    callbacks = self.callbacks
    if key.shape != callbacks.HostAllocationKey.shape_and_dtype().shape:
      return key  # In registers.
    thread, source_info = where[1:]
    key, access = self._access(key, transforms)
    memory = callbacks._get_shared_memory()
    value, _, _ = memory.get_buffer_content(
      key, access, thread, logging_info=callbacks.memory.GPULoggingInfo(*where)
    )
    if memory.detect_races:
      # A clock of its own, that of a warp as long as none runs alone: what the
      # warpgroup does itself is not what its WGMMAs have done.
      with memory.lock:
        clocks = memory.clocks[thread]
        clocks.inc(memory.thread_to_vc_position(thread.warp(0)))
        clock = clocks.async_smem_clock.copy()
      callbacks.get_races().check_read(
        thread, clock, key, access, source_info=source_info
      )
    return value
