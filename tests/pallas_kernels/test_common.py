"""What the ops share: dispatch, gradients, the chip and its block sizes."""

import json

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import chip
from pallas_kernels.common import dispatch
from pallas_kernels.common import gradient
from pallas_kernels.common import tuned
from pallas_kernels.rms_norm import rms_norm


def test_a_function_that_a_module_lacks_is_not_implemented():
  with pytest.raises(NotImplementedError, match='xla has no no_such_function'):
    dispatch.load('flash_attention', 'xla', 'no_such_function')
  with pytest.raises(NotImplementedError, match='has no no_such_backend'):
    dispatch.load('flash_attention', 'no_such_backend')


def test_a_program_for_a_mesh_is_traced_for_its_platform_alone():
  mesh = jax.make_mesh((1,), ('x',), devices=jax.devices('cpu')[:1])
  x, scale = jnp.ones((8, 128)), jnp.ones(128)
  f = jax.jit(rms_norm)
  assert 'pallas_call' in str(jax.make_jaxpr(f)(x, scale))
  with dispatch.lowered_for(mesh):
    assert 'pallas_call' not in str(jax.make_jaxpr(f)(x, scale))
  # What JAX has kept of the one is not taken for the other.
  assert 'pallas_call' in str(jax.make_jaxpr(f)(x, scale))


def test_the_gradient_is_the_given_one():
  def forward(x, ids, y):
    return x * y, (x, ids, y)

  def backward(residuals, d_out):
    x, ids, y = residuals
    assert ids.dtype == jnp.int32
    return 10 * d_out * y, None, 100 * d_out * x

  f = lambda x, y: gradient.with_gradient(
    forward, backward, x, jnp.arange(3), y
  )
  x, y = jnp.array([1.0, 2.0, 3.0]), jnp.array([5.0, 6.0, 7.0])
  out, vjp = jax.vjp(jax.jit(f), x, y)
  np.testing.assert_array_equal(out, x * y)
  dx, dy = vjp(jnp.ones(3))
  np.testing.assert_array_equal(dx, 10 * y)
  np.testing.assert_array_equal(dy, 100 * x)
  # An argument that is not there stays so.
  none = gradient.with_gradient(
    lambda x, no: (2 * x, no), lambda no, d: (d, None), x, None
  )
  np.testing.assert_array_equal(none, 2 * x)


def test_without_a_tpu_kernels_are_traced_for_a_v5e():
  assert chip.current() == chip.Tpu('v5e', 7 * 2**24)


@pytest.mark.parametrize(
  'version, name', [('TPU_V6E', 'v6e'), ('TPU_7X', 'tpu7x'), ('TPU_V4', 'v4')]
)
def test_the_chip_is_the_one_that_pallas_names(monkeypatch, version, name):
  info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion[version], 1)
  monkeypatch.setattr(pltpu, 'get_tpu_info', lambda: info)
  tpu = chip.current()
  assert tpu.name == name
  assert 0.5 * info.vmem_capacity_bytes < tpu.vmem_bytes
  assert tpu.vmem_bytes < info.vmem_capacity_bytes


def test_block_sizes_are_those_of_the_most_similar_input(tmp_path, monkeypatch):
  entry = lambda chip, length, dtype, block: dict(
    chip=chip,
    features=dict(length=length, dtype=dtype, causal=True),
    config=dict(block=block),
    cycles=1,
  )
  (tmp_path / 'op').mkdir()
  (tmp_path / 'op' / 'tuned.json').write_text(
    json.dumps(
      {
        'op': [
          entry('v5e', 1024, 'bfloat16', 1),
          entry('v5e', 4096, 'bfloat16', 2),
          entry('v5e', 4096, 'float32', 3),
          entry('v6e', 4096, 'bfloat16', 4),
        ],
        'op_backward': [entry('v5e', 1024, 'bfloat16', 5)],
      }
    )
  )
  monkeypatch.setattr(tuned, '_ROOT', tmp_path)

  def block(chip, length, dtype, causal=True, **function):
    features = dict(length=length, dtype=dtype, causal=causal)
    return tuned.lookup('op', chip, features, **function).get('block')

  assert block('v5e', 1024, 'bfloat16') == 1
  # 2,100 is nearer to 4,096 than to 1,024 by ratio.
  assert block('v5e', 2100, 'bfloat16') == 2
  assert block('v5e', 2000, 'bfloat16') == 1
  assert block('v5e', 1, 'float32') == 3
  assert block('v6e', 0, 'bfloat16') == 4
  assert block('v5e', 1024, 'bfloat16', function='op_backward') == 5
  assert block('v5p', 1024, 'bfloat16') is None
  assert block('v5e', 1024, 'float16') is None
  assert block('v5e', 1024, 'bfloat16', causal=False) is None
  assert tuned.lookup('op', 'v5e', dict(other=1)) == {}


def test_what_is_looked_up_is_known_to_who_asks(tmp_path, monkeypatch):
  monkeypatch.setattr(tuned, '_ROOT', tmp_path)
  tuned.lookup('op', 'v5e', dict(other=1))
  with tuned.questions() as asked:
    tuned.lookup('op', 'v5e', dict(width=1))
    with tuned.questions() as inner:
      tuned.lookup('op', 'h200', dict(width=2), function='f')
  tuned.lookup('op', 'v5e', dict(other=1))
  assert asked == [
    ('op', 'op', 'v5e', dict(width=1)),
    ('op', 'f', 'h200', dict(width=2)),
  ]
  assert inner == asked[1:]
