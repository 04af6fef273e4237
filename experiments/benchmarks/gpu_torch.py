"""PyTorch's contenders, on the arrays of JAX, without a copy."""

from collections.abc import Callable, Sequence
import contextlib
import time
from typing import Any

import jax

# What PyTorch says where a backend does not take the arrays.
_DECLINED = ('No available kernel', 'No viable backend')


def load() -> Any:
  """PyTorch.

  Raises:
    NotImplementedError: It is not here, or not for this device.
  """
  try:
    import torch
  except ImportError as e:
    raise NotImplementedError(f'PyTorch: {e}') from e
  if jax.default_backend() == 'gpu' and not torch.cuda.is_available():
    raise NotImplementedError('this PyTorch has no CUDA')
  return torch


def tensor(x: jax.Array) -> Any:
  """The same memory as a tensor; eight-bit floats as what they are."""
  torch = load()
  x = jax.block_until_ready(x)
  if x.dtype.name.startswith('float8'):
    bits = jax.lax.bitcast_convert_type(x, 'uint8')
    return torch.from_dlpack(jax.block_until_ready(bits)).view(
      getattr(torch, x.dtype.name)
    )
  return torch.from_dlpack(x)


class TorchCalls:
  """A function of PyTorch; see `gpu_timing.Timed`.

  Args:
    fn: Of tensors.
    *sets: Arguments of each call of a run.
  """

  def __init__(self, fn: Callable[..., Any], *sets: Sequence[Any]):
    self._torch = load()
    self._fn = fn
    self._sets = sets

  def result(self) -> Any:
    """See `gpu_timing.Timed`."""
    out = self._fn(*self._sets[0])
    self._wait()
    return out

  def seconds(self, runs: int) -> tuple[float, float]:
    """See `gpu_timing.Timed`."""
    calls = runs * len(self._sets)
    cuda = self._torch.cuda
    if not cuda.is_available():
      start = time.perf_counter()
      self._call(runs)
      seconds = (time.perf_counter() - start) / calls
      return seconds, 0.0
    events = [cuda.Event(enable_timing=True) for _ in range(2)]
    start = time.perf_counter()
    events[0].record()
    self._call(runs)
    events[1].record()
    enqueued = time.perf_counter() - start
    events[1].synchronize()
    milliseconds = events[0].elapsed_time(events[1])
    return 1e-3 * milliseconds / calls, enqueued / calls

  def _call(self, runs):
    for _ in range(runs):
      for args in self._sets:
        self._fn(*args)

  def _wait(self):
    if self._torch.cuda.is_available():
      self._torch.cuda.synchronize()


def attention(backend: str | None, arrays: Sequence[jax.Array]) -> TorchCalls:
  """`scaled_dot_product_attention`, causal.

  Args:
    backend: Name in `torch.nn.attention.SDPBackend`; `None` is its own choice.
    arrays: q, k, v in BTNH, and the gradient of the result if it is to be
      differentiated.

  Returns:
    Of the result, or of it and the gradients of q, k, v, in BTNH.

  Raises:
    NotImplementedError: No PyTorch, or it has no such kernel for these arrays.
  """
  torch = load()

  def attend(q, k, v):
    context = contextlib.nullcontext()
    if backend is not None:
      from torch.nn import attention

      context = attention.sdpa_kernel(getattr(attention.SDPBackend, backend))
    with context:
      out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        is_causal=True,
        enable_gqa=q.shape[2] != k.shape[2],
      )
    return out.transpose(1, 2)

  return _attention(attend, arrays)


def flash_attn(arrays: Sequence[jax.Array]) -> TorchCalls:
  """The `flash_attn` package: version 3 if it is there, else 2.

  Args:
    arrays: As for `attention`.

  Raises:
    NotImplementedError: It is not here.
  """
  try:
    try:
      from flash_attn_interface import flash_attn_func
    except ImportError:
      from flash_attn import flash_attn_func
  except ImportError as e:
    raise NotImplementedError(f'flash_attn: {e}') from e

  def attend(q, k, v):
    out = flash_attn_func(q, k, v, causal=True)
    # Some versions return the log-sum-exp too.
    return out[0] if isinstance(out, tuple) else out

  return _attention(attend, arrays)


def _attention(attend, arrays):
  torch = load()
  q, k, v, *d_out = (tensor(x) for x in arrays)
  if not d_out:
    call = torch.no_grad()(attend)
    calls = TorchCalls(call, (q, k, v))
  else:
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]

    def call(*inputs):
      out = attend(*inputs)
      return out.detach(), *torch.autograd.grad(out, inputs, d_out[0])

    calls = TorchCalls(call, inputs)
  try:
    calls.result()
  except RuntimeError as e:
    if any(text in str(e) for text in _DECLINED):
      raise NotImplementedError(str(e)) from e
    raise
  return calls
