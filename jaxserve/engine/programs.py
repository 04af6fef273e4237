"""Programs compiled ahead, and the watch that nothing else is compiled."""

from collections.abc import Callable, Collection, Mapping
import concurrent.futures
import threading
import time
from typing import Any
import warnings

import jax
from jax.experimental.compilation_cache import compilation_cache


class Programs:
  """Compiled programs by name. Calling one never compiles.

  Programs are traced one after the other, in the thread of the caller, whose
  settings they see, and compiled in parallel.

  Args:
    lower: Name -> function that traces it. The order is that of compilation.
    first: Those that are waited for; the others are compiled meanwhile. `None`
      is all.

  Attributes:
    seconds: Name -> what tracing and compiling it took, once compiled.
  """

  def __init__(
    self,
    lower: Mapping[str, Callable[[], jax.stages.Lowered]],
    first: Collection[str] | None = None,
  ):
    self.seconds: dict[str, float] = {}
    self._pool = concurrent.futures.ThreadPoolExecutor()
    self._compiled = {}
    for name, function in lower.items():
      start = time.perf_counter()
      lowered = function()
      traced_s = time.perf_counter() - start
      self._compiled[name] = self._pool.submit(
        self._compile, name, lowered, traced_s
      )
    try:
      for name in lower if first is None else first:
        self._compiled[name].result()
    except BaseException:
      self.close()
      raise
    for name, future in self._compiled.items():
      future.add_done_callback(lambda f, name=name: _warn(name, f))

  def __getitem__(self, name: str) -> Callable[..., Any]:
    """The program; waits for it."""
    return self._compiled[name].result()

  def is_ready(self, name: str) -> bool:
    """Whether it is compiled; never, if that failed."""
    future = self._compiled[name]
    return future.done() and not future.cancelled() and not future.exception()

  def wait(self) -> None:
    """Until all are compiled, or an error says why not."""
    for future in self._compiled.values():
      future.result()

  def close(self) -> None:
    """Forgets them; what is not being compiled yet never will be."""
    self._pool.shutdown(wait=False, cancel_futures=True)
    self._compiled = {}

  def _compile(self, name, lowered, traced_s):
    start = time.perf_counter()
    compiled = lowered.compile()
    self.seconds[name] = traced_s + time.perf_counter() - start
    return compiled


def _warn(name, future):
  if not future.cancelled() and future.exception() is not None:
    warnings.warn(f'{name} is not compiled: {future.exception()}', stacklevel=2)


def use_compilation_cache(folder: str) -> None:
  """Keeps compiled programs of this process in a folder, and looks there.

  The folder is JAX's, and so one for all programs of the process. Programs of
  any size and compile time are kept.
  """
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  # The folder of programs compiled before, if any, is held open.
  compilation_cache.reset_cache()


class NoCompiles:
  """A context in which nothing should compile; what does is counted.

  Of its own thread alone: others may compile what they like.

  Args:
    strict: Whether compiling raises a `RuntimeError`.

  Attributes:
    count: Compilations so far.
  """

  def __init__(self, strict: bool = False):
    self.strict = strict
    self.count = 0
    _listen()

  def __enter__(self):
    _watches().append(self)
    return self

  def __exit__(self, *_):
    _watches().pop()


_LOCAL = threading.local()
_LISTENING = []


def _watches():
  if not hasattr(_LOCAL, 'watches'):
    _LOCAL.watches = []
  return _LOCAL.watches


def _listen():
  if not _LISTENING:
    _LISTENING.append(True)
    jax.monitoring.register_event_duration_secs_listener(_on_event)


def _on_event(name, *_, **__):
  if not name.endswith('backend_compile_duration') or not _watches():
    return
  watch = _watches()[-1]
  watch.count += 1
  if watch.strict:
    raise RuntimeError(
      'a program was compiled while serving (strict_compile=True): an array '
      'operation outside the compiled programs'
    )
