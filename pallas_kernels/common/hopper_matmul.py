"""What the warp-specialised products on Hopper share: the ring, tiles, stores.

A block has warpgroups that multiply and, after them, one that copies. The
copies of a step of the contraction go to one slot of a ring in shared memory;
`full` says that they arrived, `empty` that every multiplying warpgroup is done
with the slot. The ring never stops: while the warpgroups that multiply store a
tile, the copies of the next one are under way.

Two blocks of a cluster may share copies: each fetches half of what both need,
and TMA writes it into the shared memory of both, which halves what crosses the
second level of cache for that operand. A slot is then empty once it is so in
both blocks.

The scheme is that of the warp-specialised persistent kernels of NVIDIA's
CUTLASS ("Efficient GEMM"), known to us and not read for this.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.common import hopper

# Bytes of the minor dimension of a tile of operands: one swizzle.
SWIZZLE = 128
# Name of the axis of the blocks of a cluster.
CLUSTER = 'peer'
# Registers of a thread: three warpgroups have 168 each, a multiple of 8.
_COPY_REGISTERS = 40
_MULTIPLY_REGISTERS = 232


@dataclasses.dataclass(frozen=True)
class Ring:
  """The barriers of a ring, as the kernel sees them.

  Attributes:
    full: One barrier per slot, which the copies of a step arrive on.
    empty: One per slot, which every multiplying warpgroup arrives on, in all
      blocks of a cluster.
    slots: How many.
  """

  full: Any
  empty: Any
  slots: int


def barriers(
  slots: int, copies: int, consumers: int, peers: int = 1
) -> tuple[Any, Any]:
  """Scratch of a ring: `full` and `empty`.

  Args:
    slots: Of the ring.
    copies: Of a step.
    consumers: Warpgroups that multiply.
    peers: Blocks of a cluster.
  """
  full = plgpu.Barrier(num_arrivals=copies, num_barriers=slots)
  kwargs = dict(num_arrivals=consumers, num_barriers=slots)
  if peers == 1:
    return full, plgpu.Barrier(**kwargs)
  return full, plgpu.ClusterBarrier(collective_axes=(CLUSTER,), **kwargs)


def run(
  ring: Ring,
  consumers: int,
  each_tile: Callable[[Callable[..., Any]], Any],
  copy: Callable[..., Any],
  multiply: Callable[..., Any],
) -> None:
  """A block: copies in the last warpgroup, and multiplies in the others.

  Registers go from the one to the others.

  Args:
    ring: That is filled.
    consumers: Warpgroups that multiply.
    each_tile: Calls what it is given for each tile of the block; returns how
      many steps the ring has seen.
    copy: For `each_tile`: fills the ring.
    multiply: For `each_tile`, after the index of its warpgroup.
  """
  wg = jax.lax.axis_index('wg')

  @pl.when(wg == consumers)
  def _():
    if consumers > 1:
      plgpu.set_max_registers(_COPY_REGISTERS, action='decrease')
    finish(ring, each_tile(copy))

  @pl.when(wg < consumers)
  def _():
    if consumers > 1:
      plgpu.set_max_registers(_MULTIPLY_REGISTERS, action='increase')
    each_tile(functools.partial(multiply, wg))

  plgpu.wait_smem_to_gmem(0)


def fill(
  ring: Ring,
  done: Any,
  steps: Any,
  copies: Callable[[Any, Any, Any], None],
) -> Any:
  """Copies the steps of one tile; returns how many steps the ring has seen.

  Args:
    ring: Its barriers.
    done: Steps of earlier tiles.
    steps: Of this one.
    copies: Takes the step, the slot and the barrier; starts every copy.
  """

  def body(step, _):
    count = done + step
    slot = jax.lax.rem(count, ring.slots)

    @pl.when(count >= ring.slots)
    def _():
      plgpu.barrier_wait(ring.empty.at[slot])

    copies(step, slot, ring.full.at[slot])
    return ()

  jax.lax.fori_loop(0, steps, body, ())
  return done + steps


def finish(ring: Ring, done: Any) -> None:
  """Waits until all slots are empty, so that a block outlives its peers' use.

  Args:
    ring: Its barriers.
    done: Steps of all tiles.
  """
  for i in range(ring.slots):
    count = done - ring.slots + i

    @pl.when(count >= 0)
    def _(count=count):
      slot = jax.lax.rem(count, ring.slots)
      plgpu.barrier_wait(ring.empty.at[slot])


def drain(
  ring: Ring,
  done: Any,
  steps: Any,
  product: Callable[[Any, Any], None],
) -> None:
  """Multiplies the steps of one tile; the accumulator is ready afterwards.

  The product of a step is still running when the next one is issued, so that
  the tensor cores never wait; a slot is given back one step late.

  Args:
    ring: Its barriers.
    done: Steps of earlier tiles.
    steps: Of this one.
    product: Takes the step and the slot; issues products and does not wait.
  """

  def body(step, _):
    count = done + step
    slot = jax.lax.rem(count, ring.slots)
    plgpu.barrier_wait(ring.full.at[slot])
    product(step, slot)
    plgpu.wgmma_wait(1)

    @pl.when(step > 0)
    def _():
      before = jax.lax.rem(count - 1, ring.slots)
      plgpu.barrier_arrive(ring.empty.at[before])

    return ()

  jax.lax.fori_loop(0, steps, body, ())
  plgpu.wgmma_wait(0)

  @pl.when(steps > 0)
  def _():
    last = jax.lax.rem(done + steps - 1, ring.slots)
    plgpu.barrier_arrive(ring.empty.at[last])


def stand_ins(warpgroups: int, k: int, dtype: DTypeLike) -> dict[str, Any]:
  """Scratch for `multiply_registers`: nothing, save when interpreted."""
  if not hopper.is_interpreted():
    return {}
  return dict(operands=plgpu.SMEM((warpgroups, hopper.ROWS, k), dtype))


def multiply_registers(
  acc: Any, a: jax.Array, b: Any, operands: Any = None
) -> None:
  """Issues `acc += a @ b`, with `a` in registers.

  Registers of `a` may be written again once `wgmma_wait` has seen the product
  end, which is the caller's to see to. The interpreter lacks operands in
  registers: there this one goes to shared memory first.

  Args:
    acc: Accumulator `[64, n]`.
    a: `[64, k]`, with k elements of it as many bytes as the swizzle of `b`.
    b: Shared memory `[k, n]`.
    operands: What `stand_ins` is allocated as, if anything.
  """
  if not hopper.is_interpreted():
    plgpu.wgmma(acc, a, b)
    return
  own = operands.at[jax.lax.axis_index('wg'), :, pl.ds(0, a.shape[1])]
  own[...] = a
  plgpu.commit_smem()
  plgpu.wgmma(acc, own, b)
  acc[...]  # Waits for it, also where the interpreter multiplies late.


def chunk(dtype: DTypeLike) -> int:
  """Columns of a result that are stored together: those of one swizzle."""
  return SWIZZLE // jnp.dtype(dtype).itemsize


def store(
  values: jax.Array,
  stage: Any,
  send: Callable[[int, Any], None],
) -> None:
  """Sends a warpgroup's tile through shared memory, some columns at a time.

  The last copy is still reading the stage on return.

  Args:
    values: `[rows, columns]`.
    stage: Shared memory `[rows, chunk]` that only this warpgroup uses.
    send: Takes the first column and the stage; starts the copies.
  """
  width = stage.shape[-1]
  for left in range(0, values.shape[1], width):
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    stage[...] = values[:, left : left + width].astype(stage.dtype)
    plgpu.commit_smem()
    send(left, stage)


def send_rows(
  stage: Any,
  low: Any,
  high: Any,
  most: int,
  target: Callable[[Any, int], Any],
) -> None:
  """Copies rows `[low, high)` of a stage, which are known at run time.

  A copy has a fixed size, so there is one for each power of two, and the bits
  of the number of rows say which are made.

  Args:
    stage: Shared memory without a swizzle, in which a copy may start anywhere.
    low: First row.
    high: Behind the last one.
    most: Rows at most, a power of two.
    target: Takes the first row and how many; returns where they go.
  """
  rows = high - low
  size = most
  while size:

    @pl.when(rows & size != 0)
    def _(size=size):
      first = low + (rows & ~(2 * size - 1))
      plgpu.copy_smem_to_gmem(stage.at[pl.ds(first, size)], target(first, size))

    size //= 2


def blocks_of_tiles(
  tile: Any, across: int, sizes: Sequence[int]
) -> tuple[Any, Any]:
  """Order of tiles that has those of a few rows, all columns, run together.

  What runs at one time then reads few rows and few columns, which the second
  level of cache keeps.

  Args:
    tile: Its number.
    across: Rows of tiles that are taken together.
    sizes: Rows of tiles, a multiple of `across`, and columns.

  Returns:
    Its row and its column.
  """
  _, columns = sizes
  block, inside = (
    jax.lax.div(tile, across * columns),
    jax.lax.rem(tile, across * columns),
  )
  row = block * across + jax.lax.rem(inside, across)
  return row, jax.lax.div(inside, across)


def tile_bytes(*tiles: tuple[tuple[int, ...], DTypeLike]) -> int:
  """Bytes of shared memory of tiles, given by shape and dtype."""
  total = 0
  for shape, dtype in tiles:
    size = jnp.dtype(dtype).itemsize
    for dim in shape:
      size *= dim
    total += size
  return total


def slots_that_fit(bytes_per_slot: int, other_bytes: int, most: int) -> int:
  """Slots of a ring beside what else a block keeps in shared memory.

  Raises:
    NotImplementedError: Not even two.
  """
  # Barriers, and alignment of tiles to 1024 bytes.
  free = hopper.current().smem_bytes - other_bytes - 2048
  slots = min(free // bytes_per_slot, most)
  if slots < 2:
    raise NotImplementedError(
      f'steps of {bytes_per_slot} bytes beside {other_bytes} in shared memory'
    )
  return slots
