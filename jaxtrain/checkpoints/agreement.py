"""Processes that tell each other short texts, without their devices.

Through the key-value store of `jax.distributed`: collectives of devices must be
started in the same order everywhere, which a thread in the background cannot
promise.
"""

import collections
import threading

import jax
from jax._src import distributed  # JAX gives no public way to the store.

_TIMEOUT_S = 1200
_rounds: collections.Counter = collections.Counter()
_lock = threading.Lock()


def gather(topic: str, text: str, timeout_s: float = _TIMEOUT_S) -> list[str]:
  """What every process says of a topic, in the order of the processes.

  Args:
    topic: All processes must come equally often to each topic.
    text: What this one says.
    timeout_s: How long to wait for the others.

  Raises:
    RuntimeError: One of them did not come in time.
  """
  if jax.process_count() == 1:
    return [text]
  with _lock:
    _rounds[topic] += 1
    number = _rounds[topic]
  client = distributed.global_state.client
  key = f'onemesh/{topic}/{number}/'
  # Empty values are not kept.
  client.key_value_set(f'{key}{jax.process_index()}', f'={text}')
  milliseconds = int(timeout_s * 1000)
  found = [
    client.blocking_key_value_get(f'{key}{i}', milliseconds)[1:]
    for i in range(jax.process_count())
  ]
  if number > 1:  # Who came to this round has read the one before.
    old = f'onemesh/{topic}/{number - 1}/{jax.process_index()}'
    client.key_value_delete(old)
  return found


def first_error(topic: str, error: BaseException | None) -> str | None:
  """What went wrong on the first process on which something did.

  Args:
    topic: See `gather`.
    error: What went wrong here, if anything.
  """
  text = '' if error is None else describe(error)
  said = gather(topic, text)
  for process, text in enumerate(said):
    if text:
      return text if len(said) == 1 else f'process {process}: {text}'
  return None


def describe(error: BaseException) -> str:
  """One line of an error, without its kind if that is a plain `ValueError`."""
  reason = str(error).strip().partition('\n')[0][:500]
  return (
    reason if type(error) is ValueError else f'{type(error).__name__}: {reason}'
  )
