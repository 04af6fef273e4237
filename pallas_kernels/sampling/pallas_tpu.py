"""sampling for TPUs: a row is read once, and its cut-offs are found in VMEM.

A cut-off is the largest logit (or weight) t of the row for which the number (or
the mass) of those at least t reaches a target. A search narrows it down: each
step counts above a probe, and moves the end of the interval to the nearest
element of the row, so that it ends at the exact element, ties or not. Probes
alternate between interpolation and bisection of the float's bits. The search
first runs on the largest of each of many small buckets of the row, which gives
a lower end that is exact, or nearly, for sets much smaller than the row.

The weights `exp((x - max) / temperature)` then replace the logits in VMEM, and
the token is found by two sums: over the rows of a `[V / 512, 512]` table, and
along the column that the random number falls in.

*Cost*: HBM: the logits once. VMEM: three blocks of rows. FLOPs: 3 to 10 passes
of 5 to 8 vector operations per number, more where sets are large.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common import chip as chip_lib
from pallas_kernels.common import tuned

# Of the table that a row of logits is taken as.
_LANES = 512
_VECTOR = 128
_UNROLL = 16
_LOG2_E = float(np.log2(np.e))
# Smaller logits count as this one.
_LEAST = -1e30
_MAX_STEPS = 100
_NUM_PARAMETERS = 5


def sampling(
  logits, temperature, top_k, top_p, min_p, uniform, *, config=None, steps=None
):
  """See `api.sampling`.

  `config` may set `rows`, how many a grid step takes. `steps` fixes how many
  steps the four searches take (top-k in buckets and in rows, then top-p), so
  that a schedule can be timed without values; results are then wrong.
  """
  b, vocab = logits.shape
  chip = chip_lib.current()
  if config is None:
    described = features(logits, temperature, top_k, top_p, min_p, uniform)
    config = tuned.lookup('sampling', chip.name, described)
  table_rows = -(-vocab // _LANES)
  # The searches take four rows of a table at a time.
  num_buckets = max(4, round(table_rows / 64) * 4)
  group = -(-table_rows // num_buckets)
  width = num_buckets * group * _LANES
  rows = config.get('rows', 32)
  while rows > 8 and (2 * rows > b or _vmem(rows, width) > chip.vmem_bytes):
    rows //= 2
  if _vmem(rows, width) > chip.vmem_bytes:
    raise NotImplementedError(f'{vocab=} does not fit the VMEM of a {chip}')
  blocks = -(-b // rows)
  top_k = jnp.where(top_k < vocab, top_k, 0)
  parameters = [temperature, top_k, top_p, min_p, uniform]
  parameters = jnp.stack([x.astype(jnp.float32) for x in parameters], axis=1)
  # Rows past the end are greedy.
  missing = blocks * rows - b
  parameters = jnp.pad(parameters, ((0, missing), (0, 0)))
  drawn = jnp.pad(temperature > 0, (0, missing))
  drawn = drawn.reshape(blocks, rows).any(axis=1).astype(jnp.int32)
  out = pl.pallas_call(
    functools.partial(_sampling_kernel, vocab=vocab, group=group, steps=steps),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(blocks,),
      in_specs=[
        pl.BlockSpec((rows, _NUM_PARAMETERS), lambda i, _: (i, 0)),
        pl.BlockSpec((rows, vocab), lambda i, _: (i, 0)),
      ],
      out_specs=pl.BlockSpec((rows, 128), lambda i, _: (i, 0)),
      scratch_shapes=[
        pltpu.VMEM((rows, width), jnp.float32),
        pltpu.VMEM((rows, num_buckets * _LANES), jnp.float32),
      ],
    ),
    out_shape=jax.ShapeDtypeStruct((blocks * rows, 128), jnp.int32),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel',),
      vmem_limit_bytes=min(chip.vmem_bytes, _vmem(rows, width) + (8 << 20)),
    ),
    name='sampling',
  )(drawn, parameters, logits.astype(jnp.float32))
  return out[:b, 0]


def features(logits, *parameters):
  """What describes an input to the tuner."""
  del parameters
  return dict(rows=logits.shape[0], vocab=logits.shape[1])


def candidates(chip, *args):
  """Configurations to try."""
  del chip, args
  return [dict(rows=rows) for rows in (8, 16, 32)]


def _vmem(rows, width):
  return int(rows * width * 4 * 3.15)


def _sampling_kernel(
  drawn_ref, rows_ref, x_ref, o_ref, w_ref, bucket_ref, *, vocab, group, steps
):
  """Of a few rows: `[rows, V]` logits in, 128 copies of each token out."""
  value, index = _read(x_ref, w_ref, bucket_ref, vocab, group)
  best = value.max(axis=1, keepdims=True)
  lane = jax.lax.broadcasted_iota(jnp.int32, value.shape, 1)
  # The first of the largest; token numbers are exact in float32.
  token = (index * _LANES + lane).astype(jnp.float32)
  token = jnp.where(value == best, token, float(2**24))
  greedy = token.min(axis=1, keepdims=True)
  o_ref[...] = jnp.broadcast_to(greedy, o_ref.shape).astype(jnp.int32)

  @pl.when(drawn_ref[pl.program_id(0)] == 1)
  def _():
    temperature, k, top_p, min_p, uniform = (
      rows_ref[:, i : i + 1] for i in range(_NUM_PARAMETERS)
    )
    drawn = temperature > 0
    given = iter(steps or (None,) * 4)
    search = lambda *args, mass: _search(*args, mass=mass, steps=next(given))
    least = jnp.full_like(best, _LEAST)
    wanted = drawn & (k > 0)
    cut = search(bucket_ref, k, least, best, wanted, mass=False)
    cut = search(w_ref, k, cut, best, wanted, mass=False)
    slope = _LOG2_E / jnp.where(drawn, temperature, 1.0)
    _weigh(bucket_ref, cut, best, slope)
    sums = _weigh(w_ref, cut, best, slope)

    one, zero = jnp.ones_like(best), jnp.zeros_like(best)
    mass = jnp.maximum(top_p * sums.sum(axis=1, keepdims=True), 1e-30)
    wanted = drawn & (top_p < 1)
    cut = search(bucket_ref, mass, zero, one, wanted, mass=True)
    cut = search(w_ref, mass, cut, one, wanted, mass=True)
    cut = jnp.maximum(cut, jnp.minimum(min_p, 1.0))
    sums = _sum_above(w_ref, cut)

    sums = _running_sum(sums, lane)
    target = uniform * sums[:, _LANES - 1 :]
    passed = sums <= target
    column = jnp.sum(passed.astype(jnp.float32), axis=1, keepdims=True)
    rest = target - jnp.where(passed, sums, 0.0).max(axis=1, keepdims=True)
    step = _passed(w_ref, cut, rest)
    step = jnp.where(lane == column.astype(jnp.int32), step, 0.0).sum(
      axis=1, keepdims=True
    )
    # Sums in another order may leave none above.
    found = drawn & (column < _LANES) & (step < w_ref.shape[1] // _LANES)
    token = jnp.where(found, step * _LANES + column, greedy)
    o_ref[...] = jnp.broadcast_to(token, o_ref.shape).astype(jnp.int32)


def _at(i):
  return pl.ds(pl.multiple_of(i * _VECTOR, _VECTOR), _VECTOR)


def _replicated(*arrays):
  """`[rows, 1]` in all lanes of a vector."""
  return [jnp.broadcast_to(x, (x.shape[0], _VECTOR)) for x in arrays]


def _over_table(ref, body, carry, unroll):
  """`body(column of vectors, where, its carry)` down the table of the rows.

  The table has rows of `_LANES` numbers: a few vectors, each with a carry.
  """
  vectors = _LANES // _VECTOR
  count = ref.shape[1] // _LANES

  def step(i, carries):
    return tuple(body(_at(i * vectors + j), carries[j]) for j in range(vectors))

  def several(i, carries):
    for j in range(unroll):
      carries = step(i * unroll + j, carries)
    return carries

  carries = (carry,) * vectors
  carries = jax.lax.fori_loop(0, count // unroll, several, carries)
  for i in range(count - count % unroll, count):
    carries = step(i, carries)
  return carries


def _read(x_ref, w_ref, bucket_ref, vocab, group):
  """Copies the logits and the largest of each bucket.

  Returns:
    `[rows, _LANES]`: the largest of each lane, and where in the lane.
  """
  shape = x_ref.shape[0], _VECTOR
  vectors = _LANES // _VECTOR
  nothing = jnp.full(shape, -jnp.inf)

  def load(i):
    start = i * _VECTOR
    if isinstance(start, int) and start + _VECTOR > vocab:
      if start >= vocab:
        return nothing
      missing = start + _VECTOR - vocab
      tail = jnp.maximum(x_ref[:, start:vocab], _LEAST)
      return jnp.pad(tail, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    return jnp.maximum(x_ref[:, _at(i)], _LEAST)

  def bucket(i, carries):
    out = []
    for j, (value, index) in enumerate(carries):
      top = nothing
      for row in range(group):
        row += i * group
        x = load(row * vectors + j)
        w_ref[:, _at(row * vectors + j)] = x
        top = jnp.maximum(top, x)
        index = jnp.where(x > value, row, index)
        value = jnp.maximum(value, x)
      bucket_ref[:, _at(i * vectors + j)] = top
      out.append((value, index))
    return tuple(out)

  carries = ((nothing, jnp.zeros(shape, jnp.int32)),) * vectors
  whole = vocab // (group * _LANES)
  carries = jax.lax.fori_loop(0, whole, bucket, carries)
  for i in range(whole, bucket_ref.shape[1] // _LANES):
    carries = bucket(i, carries)
  return (jnp.concatenate(x, axis=1) for x in zip(*carries, strict=True))


def _weigh(ref, cut, best, slope):
  """Replaces logits by weights, 0 below the cut; sums each lane."""
  cut, best, slope = _replicated(cut, best, slope)
  vectors = _LANES // _VECTOR

  def body(i, sums):
    at = [_at(i * vectors + j) for j in range(vectors)]
    # All loads before the first store, which they would have to wait for.
    logits = [ref[:, x] for x in at]
    weights = [
      jnp.where(x >= cut, jnp.exp2((x - best) * slope), 0.0) for x in logits
    ]
    for j in range(vectors):
      ref[:, at[j]] = weights[j]
    return tuple(a + b for a, b in zip(sums, weights, strict=True))

  sums = (jnp.zeros_like(cut),) * vectors
  trips = ref.shape[1] // _LANES
  sums = jax.lax.fori_loop(0, trips, body, sums)
  return jnp.concatenate(sums, axis=1)


def _sum_above(ref, cut):
  """Sums each lane over the weights that are not cut."""
  (cut,) = _replicated(cut)

  def body(at, sums):
    w = ref[:, at]
    return sums + jnp.where(w >= cut, w, 0.0)

  sums = _over_table(ref, body, jnp.zeros_like(cut), 4)
  return jnp.concatenate(sums, axis=1)


def _passed(ref, cut, rest):
  """How many running sums of each lane are at most `rest`."""
  cut, rest = _replicated(cut, rest)

  def body(at, carry):
    sums, passed = carry
    w = ref[:, at]
    sums += jnp.where(w >= cut, w, 0.0)
    return sums, passed + jnp.where(sums <= rest, 1.0, 0.0)

  zeros = jnp.zeros_like(cut)
  carries = _over_table(ref, body, (zeros, zeros), 4)
  return jnp.concatenate([passed for _, passed in carries], axis=1)


def _running_sum(x, lane):
  """Sums over the lanes up to each; Hillis and Steele's log-step scan."""
  distance = 1
  while distance < _LANES:
    x += jnp.where(lane >= distance, pltpu.roll(x, distance, 1), 0.0)
    distance *= 2
  return x


def _search(ref, target, low, top, wanted, *, mass, steps):
  """The largest element of each row above which the target is reached.

  Args:
    ref: `[rows, width]`.
    target: `[rows, 1]`, as the others; positive.
    low: Where it is known to be reached, or below all elements.
    top: The largest element.
    wanted: Rows to search; of the others, `low` is returned.
    mass: Whether to sum the elements instead of counting them.
    steps: How many to do instead of as many as are needed.

  Returns:
    The element, or `low` where the target is above the sum of all.
  """
  high = top + jnp.abs(top) * 2.0**-20 + 1e-30

  def count(probe):
    (probe,) = _replicated(probe)

    def body(i, carry):
      for j in range(_UNROLL):
        total, above, below = carry
        x = ref[:, _at(i * _UNROLL + j)]
        inside = x >= probe
        total += jnp.where(inside, x if mass else 1.0, 0.0)
        above = jnp.minimum(above, jnp.where(inside, x, jnp.inf))
        below = jnp.maximum(below, jnp.where(inside, -jnp.inf, x))
        carry = total, above, below
      return carry

    infinite = jnp.full_like(probe, jnp.inf)
    carry = jnp.zeros_like(probe), infinite, -infinite
    trips = ref.shape[1] // (_UNROLL * _VECTOR)
    carry = jax.lax.fori_loop(0, trips, body, carry)
    fold = lambda f, x: f(x, axis=1, keepdims=True)
    return tuple(map(fold, (jnp.sum, jnp.min, jnp.max), carry))

  def step(carry):
    i, _, low, high, sum_low, sum_high, todo = carry
    probe = _probe(i, low, high, sum_low, sum_high, target)
    total, above, below = count(probe)
    reached = total >= target
    # Without its least element the set would not reach the target.
    exact = total - (above if mass else 1.0) < target
    finished = (reached & exact) | (~reached & (below <= low))
    raised, lowered = (todo > 0) & reached, (todo > 0) & ~reached
    low = jnp.where(raised, above, low)
    sum_low = jnp.where(raised, total, sum_low)
    high = jnp.where(lowered, probe, high)
    sum_high = jnp.where(lowered, total, sum_high)
    todo = jnp.where(finished, 0.0, todo)
    return i + 1, jnp.max(todo), low, high, sum_low, sum_high, todo

  todo = wanted.astype(jnp.float32)
  zeros = jnp.zeros_like(low)
  carry = jnp.int32(0), jnp.max(todo), low, high, zeros, zeros, todo
  if steps is not None:
    return jax.lax.fori_loop(0, steps, lambda _, x: step(x), carry)[2]
  more = lambda x: (x[1] > 0) & (x[0] < _MAX_STEPS)
  return jax.lax.while_loop(more, step, carry)[2]


def _probe(i, low, high, sum_low, sum_high, target):
  """Where step i counts: at `low` first, later between both ends."""
  share = (sum_low - target) / jnp.maximum(sum_low - sum_high, 1e-30)
  between = low + (high - low) * jnp.clip(share, 1 / 32, 1 / 2)
  first, last = _ordered(low), _ordered(high)
  middle = _unordered(jnp.maximum((first >> 1) + (last >> 1), first + 1))
  between = jnp.where(i % 3 == 2, middle, between)
  probe = jnp.where(between > low, between, middle)
  return jnp.where(i == 0, low, probe)


def _ordered(x):
  """float32 -> int32 in the same order."""
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _unordered(bits):
  bits ^= (bits >> 31) & 0x7FFFFFFF
  return jax.lax.bitcast_convert_type(bits, jnp.float32)
