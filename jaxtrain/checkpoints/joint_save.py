"""Processes that save together learn at once if one of them cannot.

Orbax lets them meet twice in the background: when all have written, and when
process 0 has finished. One that fails does not come, and the others wait for it
for twenty minutes. Here it tells them.
"""

import itertools
import time

import jax
from jax._src import distributed  # JAX gives no public way to the store.
from orbax.checkpoint import multihost

from jaxtrain.checkpoints import agreement

_MEETINGS = ('async_write_complete', 'async_commit_complete')
_SLICE_MS = 1000
_numbers = itertools.count()


class JointSave:
  """The saves of one manager. Make them in the same order on every process."""

  def __init__(self):
    self._number = next(_numbers)
    self._attempt = 0

  def begin(self) -> None:
    """Another save begins. Call from every process."""
    self._attempt += 1
    if jax.process_count() > 1 and jax.process_index() == 0:
      # All processes have ended the one before the last.
      _client().key_value_delete(f'{self._prefix(self._attempt - 2)}/')

  def fail(self, error: BaseException) -> None:
    """Tells the others that this process cannot do its part."""
    if jax.process_count() > 1:
      _client().key_value_set(
        f'{self._prefix()}/failed/{jax.process_index()}',
        agreement.describe(error),
        allow_overwrite=True,
      )

  def barrier(self, *, key: str, timeout_ms: int) -> None:
    """Waits until all processes have come here; orbax's `barrier_sync_fn`.

    Raises:
      RuntimeError: One of them failed.
      TimeoutError: One of them did not come in time.
    """
    if jax.process_count() == 1:
      return
    if not any(meeting in key for meeting in _MEETINGS):
      multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)
      return
    place = f'{self._prefix()}/{key}/'
    _client().key_value_set(f'{place}{jax.process_index()}', 'here')
    end = time.monotonic() + timeout_ms / 1000
    for other in range(jax.process_count()):
      while not self._is_there(f'{place}{other}'):
        if time.monotonic() > end:
          raise TimeoutError(f'process {other} did not come to {key}')

  def _is_there(self, key):
    """Waits a moment for a process; raises if one has failed."""
    try:
      _client().blocking_key_value_get(key, _SLICE_MS)
      return True
    except jax.errors.JaxRuntimeError as e:
      if 'DEADLINE_EXCEEDED' not in str(e):
        raise
    failed = _client().key_value_dir_get(f'{self._prefix()}/failed/')
    for name, text in failed:
      raise RuntimeError(f'process {name.rpartition("/")[2]}: {text}')
    return False

  def _prefix(self, attempt=None):
    attempt = self._attempt if attempt is None else attempt
    return f'onemesh/save/{self._number}/{attempt}'


def _client():
  return distributed.global_state.client
