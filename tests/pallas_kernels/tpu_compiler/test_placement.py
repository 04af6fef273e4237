"""Values of operands: found in the trace, laid out in memory."""

import functools

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from pallas_kernels.tpu_compiler import listing
from pallas_kernels.tpu_compiler import operands
from pallas_kernels.tpu_compiler import placement
from pallas_kernels.tpu_compiler.hlo import Layout


def _double(table, x):
  def kernel(table_ref, x_ref, o_ref):
    o_ref[...] = x_ref[...] * 2 + table_ref[0]

  shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
  return pl.pallas_call(kernel, out_shape=shape, name='double')(table, x)


def _operands(fn, *args):
  """Runs the partial evaluation; numpy arguments are known, others not."""
  values = [a if isinstance(a, np.ndarray) else None for a in args]
  return operands.pallas_operands(jax.make_jaxpr(fn)(*args), values)


_TABLE = np.array([3, 1, 2], np.int32)
_X = jax.ShapeDtypeStruct((3,), jnp.int32)


@pytest.mark.parametrize(
  'fn',
  [
    lambda t, x: _double(jnp.cumsum(t) + 1, x),
    lambda t, x: jax.jit(_double)(jnp.cumsum(t) + 1, x),
    lambda t, x: jax.checkpoint(_double)(jax.jit(jnp.cumsum)(t) + 1, x),
    lambda t, x: _double(jnp.array([4, 5, 7], jnp.int32), x),
  ],
  ids=['plain', 'jit', 'remat', 'constant'],
)
def test_known_operands_are_computed(fn):
  (call,) = _operands(fn, _TABLE, _X)
  assert call.name == 'double'
  assert call.shapes == (((3,), 'int32'), ((3,), 'int32'))
  np.testing.assert_array_equal(call.values[0], [4, 5, 7])
  assert call.values[1] is None


def test_what_a_loop_does_not_change_is_known_inside():
  def fn(t, x):
    return jax.lax.scan(lambda c, _: (_double(t, c), None), x, length=3)

  (call,) = _operands(fn, _TABLE, _TABLE)
  np.testing.assert_array_equal(call.values[0], _TABLE)
  assert call.values[1] is None  # Carried: another one in each round.


def test_what_a_loop_hands_out_is_known():
  def fn(t, x):
    def layer(carry, _):
      return carry + x, jnp.cumsum(t)

    carry, stacked = jax.lax.scan(layer, x, length=3)
    picked = jax.lax.cond(carry[0] > 0, lambda s: s[0], lambda s: s[1], stacked)
    return _double(picked, carry)

  (call,) = _operands(fn, _TABLE, _X)
  np.testing.assert_array_equal(call.values[0], np.cumsum(_TABLE))
  assert call.values[1] is None


def test_a_shard_sees_its_part():
  mesh = jax.make_mesh((2,), ('x',), axis_types=(AxisType.Auto,))

  @functools.partial(
    jax.shard_map, mesh=mesh, in_specs=P('x'), out_specs=P('x'), check_vma=False
  )
  def fn(t):
    return _double(jnp.cumsum(t), t)

  (call,) = _operands(fn, np.array([3, 1, 3, 1], np.int32))
  np.testing.assert_array_equal(call.values[0], [3, 4])


def test_dependence_on_unknown_inputs_is_unknown():
  (call,) = _operands(lambda t, x: _double(t + x, x), _TABLE, _X)
  assert call.values == (None, None)


_LISTING = """
0x0 : { %s1_s1 = inlined_call_operand.smem [shape: s32[3], index: 0, kind: \
input]  ;;  %s2_s2 = inlined_call_operand.hbm [shape: s32[3], index: 1, kind: \
input]  ;;  %s3_s3 = inlined_call_operand.hbm [shape: s32[3], index: 0, kind: \
output] }
"""


def _call(values, name='double', shape=(3,)):
  shapes = ((shape, 'int32'),) * 2
  return operands.PallasOperands(name, shapes, values)


def test_operands_go_to_the_kernel_with_their_shapes():
  parsed = listing.parse('double.1', _LISTING)
  other = _call((_TABLE + 9, None), shape=(4,))
  known = placement.known_operands(parsed, [other, _call((_TABLE, None))])
  assert list(known) == [0]
  np.testing.assert_array_equal(known[0], _TABLE)


def test_the_name_decides_between_equal_shapes():
  parsed = listing.parse('double.1', _LISTING)
  triple = _call((_TABLE + 9, None), name='triple')
  known = placement.known_operands(parsed, [triple, _call((_TABLE, None))])
  np.testing.assert_array_equal(known[0], _TABLE)


def test_where_calls_disagree_nothing_is_known():
  parsed = listing.parse('double.1', _LISTING)
  calls = [_call((_TABLE, _TABLE)), _call((_TABLE, _TABLE + 1))]
  known = placement.known_operands(parsed, calls)
  assert list(known) == [0]


@pytest.mark.parametrize('shape', [(5,), (3, 200), (2, 9, 130)])
@pytest.mark.parametrize('dtype', ['int32', 'float32', 'int8', 'bfloat16'])
def test_memory_image_is_tiled(shape, dtype):
  dtype = jnp.dtype(dtype)
  value = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
  minor = tuple(range(len(shape)))[::-1]
  tile = (8, 128) if len(shape) > 1 else (128,)
  words = placement.memory_image(value, Layout(minor, (tile,)))
  flat = words.view(np.uint8).view(dtype)
  rows, columns = (1, *shape)[-2:]
  tile_rows, tile_columns = (1, *tile)[-2:]
  down, across = -(-rows // tile_rows), -(-columns // tile_columns)
  rng = np.random.default_rng(0)
  for _ in range(50):
    index = tuple(rng.integers(shape))
    r, c = (0, *index)[-2:]
    plane = index[0] if len(shape) == 3 else 0
    number = plane * down * across + (r // tile_rows) * across
    number += c // tile_columns
    place = number * tile_rows * tile_columns
    place += (r % tile_rows) * tile_columns + c % tile_columns
    assert flat[place] == value[index]


def test_memory_image_of_two_tilings():
  # T(8,128)(2,1): pairs of rows share a 32-bit word.
  value = np.arange(16 * 128, dtype=np.uint16).reshape(16, 128)
  at = lambda row, column: int(value[row, column])
  words = placement.memory_image(value, Layout((1, 0), ((8, 128), (2, 1))))
  assert words[0] == at(0, 0) | at(1, 0) << 16
  assert words[1] == at(0, 1) | at(1, 1) << 16
  assert words[128] == at(2, 0) | at(3, 0) << 16
  assert words[512] == at(8, 0) | at(9, 0) << 16


def test_wide_types_have_no_image():
  assert placement.memory_image(np.zeros(3, np.float64), None) is None
