"""Processes that save together learn at once if one of them cannot.

Orbax lets them meet twice in the background: when all have written, and when
process 0 has finished. One that fails does not come, and the others wait for it
for twenty minutes. Here it tells them.
"""

import collections
import time

import jax
from jax._src import distributed  # JAX gives no public way to the store.
from orbax.checkpoint import multihost

from jaxtrain.checkpoints import agreement

_MEETINGS = ('async_write_complete', 'async_commit_complete')
_SLICE_MS = 1000
_attempts: collections.Counter = collections.Counter()


class JointSave:
  """The saves into one folder.

  Args:
    directory: The folder.
  """

  def __init__(self, directory: str):
    self._directory = directory

  def begin(self) -> None:
    """Another save begins. Call from every process."""
    _attempts[self._directory] += 1
    if jax.process_count() > 1 and jax.process_index() == 0:
      # All processes have ended the one before the last.
      number = _attempts[self._directory] - 2
      _client().key_value_delete(f'{self._prefix(number)}/')

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

  def _prefix(self, number=None):
    number = _attempts[self._directory] if number is None else number
    return f'onemesh/save/{self._directory}/{number}'


def _client():
  return distributed.global_state.client
