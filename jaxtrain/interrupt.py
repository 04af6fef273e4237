"""Stops a loop between two steps when the machine is taken away.

Cloud machines that can be preempted send SIGTERM and allow half a minute or so;
a person sends SIGINT. Neither may interrupt a step or a save.
"""

from collections.abc import Callable
import os
import signal
import threading
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
  """Context in which SIGTERM and SIGINT set a flag instead of killing.

  The second signal kills as it would have without this. Outside the main
  thread, where Python allows no handlers, signals keep their usual meaning.
  """

  def __init__(self):
    self._received: str | None = None
    self._old = {}

  def __enter__(self) -> 'StopSignal':
    if threading.current_thread() is threading.main_thread():
      self._old = {s: signal.signal(s, self._handle) for s in _SIGNALS}
    return self

  def __exit__(self, *error) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)

  @property
  def name(self) -> str:
    """The signal that came, for messages."""
    return self._received or 'a signal to another process'

  def flags(self, mesh: Mesh) -> jax.Array:
    """`[mesh.size]` int32, one per device: 1 where its process must stop."""
    value = np.array([self._received is not None], np.int32)
    sharding = NamedSharding(mesh, P(mesh.axis_names))
    return jax.make_array_from_callback((mesh.size,), sharding, lambda _: value)

  def _handle(self, number, frame):
    del frame
    if self._received is not None:
      signal.signal(number, self._old[number])
      os.kill(os.getpid(), number)
    self._received = signal.Signals(number).name


def with_stop(step: Callable[..., Any]) -> Callable[..., Any]:
  """Makes a training step tell all processes whether one of them must stop.

  The flags travel with the step, so that all learn of it at the same step, and
  no other program has to run between steps.

  Args:
    step: `(state, batch) -> (state, metrics)`.

  Returns:
    `(state, batch, flags) -> (state, metrics)`, not jitted, with the largest of
    `StopSignal.flags` as the metric 'stop'.
  """

  def step_with_stop(state, batch, flags):
    state, metrics = step(state, batch)
    return state, {**metrics, 'stop': jnp.max(flags)}

  return step_with_stop
