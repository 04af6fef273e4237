"""Device side of the engine: parameters, pages, and the compiled steps.

One program per token bucket, compiled before the first request and called as a
compiled object: a step whose shapes no program has is an error, never a
compilation.
"""

import concurrent.futures
import dataclasses
import time
from typing import Any

import jax
import numpy as np

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.layout import Layout
from jaxserve.engine.step import Step
from jaxtrain.models.config import ModelConfig
from jaxtrain.sharding import ShardingRules


@dataclasses.dataclass(frozen=True)
class StepResult:
  """Tokens of one step, on their way to the host.

  `packed [U, 2 + 2n]` int32: token, bits of its log-probability, then ids and
  bits of the n likeliest.
  """

  packed: jax.Array
  num_logprobs: int

  def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Waits for tokens `[U]`, logprobs `[U]`, top ids and top logprobs."""
    packed, n = np.asarray(self.packed), self.num_logprobs
    floats = packed.view(np.float32)
    return (
      packed[:, 0],
      floats[:, 1],
      packed[:, 2 : 2 + n],
      floats[:, 2 + n :],
    )


class Runner:
  """Owns the parameters' programs and the page pool.

  Args:
    config: Architecture.
    params: Parameter tree, already on `mesh`.
    mesh: Where it runs.
    rules: How the parameters were laid out.
    engine: Sizes.
    num_pages: Pages in the pool.
    max_seq_len: Longest request, in tokens.
    dtype: Compute dtype.
  """

  def __init__(
    self,
    config: ModelConfig,
    params: Any,
    mesh: jax.sharding.Mesh,
    rules: ShardingRules,
    engine: EngineConfig,
    *,
    num_pages: int,
    max_seq_len: int,
    dtype: Any,
  ):
    self._step = Step(
      config,
      mesh,
      rules,
      engine,
      num_pages=num_pages,
      max_seq_len=max_seq_len,
      dtype=dtype,
    )
    self._params = params
    self._pages = self._step.allocate_pages()
    self._last_tokens = jax.device_put(
      np.zeros(engine.max_num_requests, np.int32), self._step.replicated
    )
    self.num_logprobs = self._step.num_logprobs
    self.layouts = self._step.layouts
    start = time.perf_counter()
    self._programs = self._compile()
    self.compile_s = time.perf_counter() - start

  @property
  def num_programs(self) -> int:
    return len(self._programs)

  @property
  def cache_bytes(self) -> int:
    return self._pages.k.nbytes + self._pages.v.nbytes

  def layout_for(self, num_tokens: int) -> Layout:
    """The smallest bucket that holds `num_tokens`."""
    return self.layouts[min(t for t in self.layouts if t >= num_tokens)]

  def run(self, layout: Layout, buffer: np.ndarray) -> StepResult:
    """Dispatches one step and starts the copy of its tokens; does not wait."""
    self._pages, self._last_tokens, packed = self._programs[layout.num_tokens](
      self._params,
      self._pages,
      self._last_tokens,
      jax.device_put(buffer, self._step.replicated),
    )
    packed.copy_to_host_async()
    return StepResult(packed, self.num_logprobs)

  def close(self) -> None:
    """Frees the page pool; parameters belong to the caller."""
    for x in (*jax.tree.leaves(self._pages), self._last_tokens):
      x.delete()
    self._programs = {}
    self._params = None

  def _compile(self):
    def lower(layout):
      _, _, buffer = self._step.abstract_args(layout)
      return self._step.jitted(layout).lower(
        self._params, self._pages, self._last_tokens, buffer
      )

    lowered = {t: lower(layout) for t, layout in self.layouts.items()}
    with concurrent.futures.ThreadPoolExecutor() as pool:
      compiled = pool.map(lambda x: x.compile(), lowered.values())
      return dict(zip(lowered, compiled, strict=True))
