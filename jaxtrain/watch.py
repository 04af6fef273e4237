"""Watches a run: where its time goes, and signs of life for a supervisor."""

from collections.abc import Callable, Iterator
import contextlib
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtrain import fingerprint as fingerprint_lib
from jaxtrain.goodput import Goodput
from jaxtrain.goodput import Span
from jaxtrain.heartbeat import Heartbeat


class Watch:
  """Tells both the account of time and the supervisor, if there is one.

  Args:
    goodput: Account of time.
    heartbeat: Signs of life, or `None`.
    mesh: Of the run.
  """

  def __init__(self, goodput: Goodput, heartbeat: Heartbeat | None, mesh: Mesh):
    self._goodput, self._heartbeat, self._mesh = goodput, heartbeat, mesh
    self._fingerprint = self._groups = None

  @contextlib.contextmanager
  def doing(self, category: str) -> Iterator[Span]:
    """Context of what is done, one of `goodput.CATEGORIES`."""
    with self._phase(category), self._goodput.measure(category) as span:
      yield span

  def on_device(self) -> contextlib.AbstractContextManager:
    """Context in which the loop waits for devices, and so for the others."""
    return self._phase('device')

  def resumed(self, step: int) -> None:
    """Says how many steps had been made before."""
    self._goodput.resumed(step)
    if self._heartbeat:
      self._heartbeat.resumed(step)

  def step_done(self, step: int, fingerprint: jax.Array | None) -> None:
    """Says that a step is complete.

    Args:
      step: Its number, from 1.
      fingerprint: What `fingerprint` gave for it.
    """
    self._goodput.step_done(step)
    if self._heartbeat:
      if fingerprint is not None:
        # On CPUs it may stand in line behind the next step.
        with self.on_device():
          sums = fingerprint_lib.by_group(fingerprint, self._groups)
        self._heartbeat.fingerprint(step, sums)
      self._heartbeat.step_done(step)

  def end(self, why: str) -> None:
    """Says why the run has ended."""
    self._goodput.end(why)
    if self._heartbeat:
      self._heartbeat.end(why)

  def fingerprint(
    self,
    step: int,
    params: Any,
    is_saved: bool,
    compile: Callable[..., Any],
  ) -> jax.Array | None:
    """Dispatches a checksum of the parameters.

    Args:
      step: Of which they are.
      params: Parameters.
      is_saved: Whether they will be saved: then it is not left out.
      compile: `(name, function, *arguments)` to a compiled function.

    Returns:
      Checksums on the devices, or `None` if none are due.
    """
    every = self._heartbeat and self._heartbeat.fingerprint_every
    if not every or not (is_saved or step % every == 0):
      return None
    if self._fingerprint is None:
      function = fingerprint_lib.make_fingerprint(params, self._mesh)
      self._fingerprint = compile('fingerprint', function, params)
      self._groups = fingerprint_lib.groups(params, self._mesh)
    with self.on_device():
      return self._fingerprint(params)

  def _phase(self, name):
    if self._heartbeat is None:
      return contextlib.nullcontext()
    return self._heartbeat.phase(name)
