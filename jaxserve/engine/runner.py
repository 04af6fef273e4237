"""Device side of the engine: parameters, pages, row state, compiled programs.

One program per token bucket and a few small ones, compiled before the first
request and called as compiled objects: a step whose shapes no program has is an
error, never a compilation.
"""

from collections.abc import Sequence
import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np

from jaxserve.engine import drawing
from jaxserve.engine import page_copies
from jaxserve.engine import row_state
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.drawing import Sampled
from jaxserve.engine.layout import Layout
from jaxserve.engine.programs import NoCompiles
from jaxserve.engine.programs import Programs
from jaxserve.engine.step import Step
from jaxtrain.models.config import ModelConfig
from jaxtrain.sharding import ShardingRules
from jaxtrain.sharding.partition import path_name

# Masks of one `set_masks` call on the device; more take several.
_MASKS_AT_ONCE = 16


@dataclasses.dataclass(frozen=True)
class StepResult:
  """What one step sampled, on its way to the host."""

  packed: jax.Array
  num_logprobs: int

  def read(self) -> Sampled:
    """Waits for it."""
    return drawing.unpack(np.asarray(self.packed), self.num_logprobs)


class Runner:
  """Owns the parameters' programs, the page pool and the row state.

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
    self._state = self._step.allocate_state()
    self._num_pages = num_pages
    self._put = functools.partial(jax.device_put, device=self._step.replicated)
    self.sizes = self._step.sizes
    self.num_logprobs = self._step.num_logprobs
    self.layouts = self._step.layouts
    self._late = NoCompiles(engine.strict_compile)
    start = time.perf_counter()
    self._programs = Programs(self._lowerings())
    self.compile_s = time.perf_counter() - start

  @property
  def num_programs(self) -> int:
    """Programs that run steps."""
    return len(self.layouts)

  @property
  def num_late_compiles(self) -> int:
    """Compilations since the start, in the threads that called this."""
    return self._late.count

  @property
  def compile_seconds(self) -> dict[str, float]:
    """What each program took to compile."""
    return dict(self._programs.seconds)

  @property
  def cache_bytes(self) -> int:
    return self._pages.k.nbytes + self._pages.v.nbytes

  @property
  def page_bytes(self) -> int:
    """Size of one page: keys and values, all layers, all devices."""
    return self.cache_bytes // self._num_pages

  def layout_for(self, num_tokens: int) -> Layout:
    """The smallest bucket that holds `num_tokens`."""
    return self.layouts[min(t for t in self.layouts if t >= num_tokens)]

  def run(self, layout: Layout, buffer: np.ndarray) -> StepResult:
    """Dispatches one step and starts the copy of its tokens; does not wait."""
    with self._late:
      self._pages, self._state, packed = self._programs[layout.name](
        self._params, self._pages, self._state, self._put(buffer)
      )
      packed.copy_to_host_async()
    return StepResult(packed, self.num_logprobs)

  def set_row(
    self,
    row: int,
    *,
    tokens: Sequence[int] = (),
    bias_ids: Sequence[int] = (),
    bias: Sequence[float] = (),
    stop_ids: Sequence[int] = (),
    mask: np.ndarray | None = None,
  ) -> None:
    """Tells the device what the next steps must know of a row.

    Needed by rows whose `features` are not 0 alone; steps do the rest.

    Args:
      row: Which.
      tokens: Those known, from position 0; steps enter what they run.
      bias_ids: Tokens with a bias.
      bias: What is added to their logits.
      stop_ids: Tokens that cannot be drawn before `min_position`.
      mask: Words of uint32; bit `v % 32` of word `v // 32` is set where token v
        is allowed. `None` allows all.

    Raises:
      ValueError: More of something than `sizes` has room for.
    """
    buffer = row_state.pack_row(
      self.sizes,
      row,
      tokens=tokens,
      bias_ids=bias_ids,
      bias=bias,
      stop_ids=stop_ids,
      mask=mask,
    )
    with self._late:
      self._state = self._programs['set_row'](self._state, self._put(buffer))

  def set_masks(self, rows: Sequence[int], masks: np.ndarray) -> None:
    """Replaces the masks `[len(rows), W]` of different rows."""
    width = self._masks_at_once
    for i in range(0, len(rows), width):
      chunk = rows[i : i + width]
      # The last column is the row.
      buffer = np.full((width, self.sizes.num_words + 1), self.sizes.num_rows)
      buffer = buffer.astype(np.uint32)
      buffer[: len(chunk), -1] = chunk
      buffer[: len(chunk), :-1] = masks[i : i + width]
      with self._late:
        self._state = self._programs['set_masks'](
          self._state, self._put(buffer)
        )

  def copy_pages(self, source: Sequence[int], target: Sequence[int]) -> None:
    """Copies pages within the pool; no page is both source and target."""
    copy = self._programs['copy_pages']
    for ids in page_copies.pairs(source, target, self._num_pages):
      with self._late:
        self._pages = copy(self._pages, self._put(ids))

  def read_pages(self, pages: Sequence[int]) -> page_copies.PagesInFlight:
    """Starts to copy pages to the host; they may be overwritten at once."""
    read = self._programs['read_pages']
    with self._late:
      return page_copies.read(
        lambda ids: read(self._pages, self._put(ids)), pages
      )

  def write_pages(
    self, pages: Sequence[int], arrays: page_copies.HostPages
  ) -> None:
    """Fills pages with what `read_pages` read."""
    write = self._programs['write_pages']
    for ids, part in page_copies.parts(pages, arrays, self._num_pages):
      with self._late:
        part = jax.device_put(part, self._step.pool)
        self._pages = write(self._pages, self._put(ids), part)

  def clear_pages(self, pages: Sequence[int]) -> None:
    """Zeroes pages."""
    shape = (len(pages), *self._pages.k.shape[2:])
    zeros = np.zeros((self._pages.k.shape[0], *shape), self._pages.k.dtype)
    self.write_pages(pages, (zeros, zeros))

  def reset(self) -> None:
    """A new pool and row state, where a failed step has lost the old ones."""
    for x in jax.tree.leaves((self._pages, self._state)):
      if not x.is_deleted():
        x.delete()
    self._pages = self._step.allocate_pages()
    self._state = self._step.allocate_state()

  def update_params(self, params: Any) -> None:
    """Runs the next steps with other parameters: no copy, no compilation.

    Raises:
      ValueError: The tree, or a leaf's shape, dtype or sharding, is not that of
        before; the first difference is named.
    """
    old, new = jax.tree.structure(self._params), jax.tree.structure(params)
    if old != new:
      raise ValueError(f'update_params: the tree is {new}, it must be {old}')
    paths, _ = jax.tree_util.tree_flatten_with_path(self._params)
    for (path, old), new in zip(paths, jax.tree.leaves(params), strict=True):
      if difference := _difference(old, new):
        raise ValueError(f'update_params: {path_name(path)} {difference}')
    self._params = params

  def close(self) -> None:
    """Frees pages and row state; parameters belong to the caller."""
    for x in jax.tree.leaves((self._pages, self._state)):
      x.delete()
    self._programs.close()
    self._params = None

  @property
  def _masks_at_once(self):
    return min(_MASKS_AT_ONCE, self.sizes.num_rows)

  def _lowerings(self):
    step = self._step

    def lower_step(layout):
      *_, buffer = step.abstract_args(layout)
      return step.jitted(layout).lower(
        self._params, self._pages, self._state, buffer
      )

    def lower_setter(function, shape, dtype):
      buffer = jax.ShapeDtypeStruct(shape, dtype, sharding=step.replicated)
      run = lambda state, buffer: step.pin(function(state, buffer))
      return jax.jit(run, donate_argnums=0).lower(self._state, buffer)

    sizes = self.sizes
    masks = (self._masks_at_once, sizes.num_words + 1)
    return {
      layout.name: functools.partial(lower_step, layout)
      for layout in self.layouts.values()
    } | {
      'set_row': lambda: lower_setter(
        functools.partial(row_state.set_row, sizes), (sizes.row_size,), np.int32
      ),
      'set_masks': lambda: lower_setter(
        lambda state, x: row_state.set_masks(
          state, x[:, -1].astype(int), x[:, :-1]
        ),
        masks,
        np.uint32,
      ),
      **page_copies.programs(self._pages, step.replicated),
    }


def _difference(old, new):
  """How a leaf differs from the one it would replace; '' if it does not."""
  for name in ('shape', 'dtype'):
    was, is_ = getattr(old, name), getattr(new, name, None)
    if was != is_:
      return f'has {name} {is_}, it must have {was}'
  sharding = getattr(new, 'sharding', None)
  if sharding is None or not sharding.is_equivalent_to(old.sharding, old.ndim):
    return f'has sharding {sharding}, it must have {old.sharding}'
  return ''
