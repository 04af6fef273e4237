"""The loss of all logits without all logits, on one device and on a mesh."""

import functools
import inspect
import re

import hypothesis
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.linear_cross_entropy import pallas_tpu
from pallas_kernels.linear_cross_entropy import reference

_B, _T, _D, _V = 4, 64, 16, 256

_reference = reference.linear_cross_entropy


def _inputs(dtype='float32'):
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (_B, _T, _D), dtype)
  head = jax.random.normal(keys[1], (_D, _V), dtype)
  targets = jax.random.randint(keys[2], (_B, _T), 0, _V)
  weights = jnp.where(jnp.arange(_T) % 5 == 0, 0.0, 1.0) * jnp.ones((_B, 1))
  return x, head, targets, weights


def _loss_and_grads(**kwargs):
  def f(x, head, targets, weights):
    return linear_cross_entropy(x, head, targets, weights, **kwargs)

  return jax.value_and_grad(f, (0, 1), has_aux=True)


def test_equals_optax_on_full_logits():
  x, head, targets, weights = _inputs()

  def full(x, head):
    logits = x @ head
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    hit = logits.argmax(-1) == targets
    return jnp.sum(nll * weights), jnp.sum(hit * weights)

  (loss, sums), grads = jax.jit(_loss_and_grads())(x, head, targets, weights)
  (expected, hits), expected_grads = jax.jit(
    jax.value_and_grad(full, (0, 1), has_aux=True)
  )(x, head)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  np.testing.assert_allclose(sums['nll'], expected, rtol=1e-6)
  assert sums['weight'] == weights.sum() and sums['correct'] == hits
  for a, e in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(a, e, atol=1e-5)


def _sizes(jaxpr):
  """Sizes of all results in a jaxpr and those inside it."""
  for eqn in jaxpr.eqns:
    yield from (v.aval.size for v in eqn.outvars)
    for inner in jax.extend.core.jaxprs_in_params(eqn.params):
      yield from _sizes(inner)


@pytest.mark.parametrize('kwargs', [{}, dict(z_loss=1e-3, logit_soft_cap=5.0)])
def test_no_array_of_all_logits_exists(kwargs):
  inputs = _inputs()
  f = _loss_and_grads(chunk=8, implementation='xla', **kwargs)
  largest = max(_sizes(jax.make_jaxpr(f)(*inputs).jaxpr))
  assert largest <= max(_B * 8 * _V, _D * _V, _B * _T * _D)
  memory = jax.jit(f).lower(*inputs).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4 * _B * _T * _V


def test_undifferentiated_loss_makes_no_gradients():
  inputs = _inputs()
  f = lambda *args: linear_cross_entropy(*args, chunk=8)[0]
  flops = lambda g: jax.jit(g).lower(*inputs).compile().cost_analysis()['flops']
  assert flops(f) < 0.5 * flops(_loss_and_grads(chunk=8))
  (loss, _), _ = _loss_and_grads(chunk=8)(*inputs)
  np.testing.assert_allclose(f(*inputs), loss, rtol=1e-6)


def test_gradient_follows_the_cotangent_and_the_weights():
  x, head, targets, weights = _inputs()
  f = lambda w, scale: scale * linear_cross_entropy(x, head, targets, w)[0]
  d_weights = jax.grad(f)(weights, 3.0)
  nll = optax.softmax_cross_entropy_with_integer_labels(x @ head, targets)
  np.testing.assert_allclose(d_weights, 3 * nll, rtol=1e-5)


def _mesh_inputs(mesh):
  specs = (
    jax.P('data'),
    jax.P(None, 'tensor'),
    jax.P('data'),
    jax.P('data'),
  )
  return jax.device_put(
    _inputs(), tuple(jax.NamedSharding(mesh, s) for s in specs)
  )


def test_on_a_mesh_equals_one_device_and_sums_the_head_once():
  mesh = jax.make_mesh(
    (2, 2, 2),
    ('data', 'fsdp', 'tensor'),
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )
  f = jax.jit(_loss_and_grads(chunk=8, shards=(2, 1)))
  inputs = _mesh_inputs(mesh)
  actual = f(*inputs)
  expected = jax.jit(_loss_and_grads(chunk=8))(*_inputs())
  for a, e in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)
  # Inside the loop over chunks nothing as large as a shard of the head moves.
  hlo = f.lower(*inputs).compile().as_text()
  bodies = set(re.findall(r'body=%?([\w.\-]+)', hlo))
  assert bodies
  for computation in re.split(r'\n(?=%|ENTRY)', hlo):
    name = re.match(r'(?:ENTRY )?%?([\w.\-]+)', computation).group(1)
    if name in bodies:
      for shape in re.findall(
        r'f32\[([\d,]+)\]\S* (?:all-reduce|reduce-scatter)', computation
      ):
        assert np.prod([int(n) for n in shape.split(',')]) < _D * _V / 8


def test_inside_shard_map_the_head_gradient_is_summed():
  mesh = jax.make_mesh(
    (4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )

  def local(*args):
    return jax.lax.psum(linear_cross_entropy(*args, chunk=8)[0], 'data')

  rows = jax.P('data')
  sharded = jax.shard_map(
    local, mesh=mesh, in_specs=(rows, jax.P(), rows, rows), out_specs=jax.P()
  )
  whole = lambda *args: linear_cross_entropy(*args, chunk=8)[0]
  actual, expected = (
    jax.jit(jax.value_and_grad(f, (0, 1)))(*_inputs()) for f in (sharded, whole)
  )
  for a, e in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('implementation', ['xla', 'pallas_tpu'])
def test_a_vocabulary_split_over_a_mesh_axis(implementation):
  mesh = jax.make_mesh(
    (2, 2),
    ('data', 'tensor'),
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
    devices=jax.devices()[:4],
  )
  kwargs = dict(z_loss=1e-2, logit_soft_cap=5.0)

  def local(*args):
    loss, sums = linear_cross_entropy(
      *args, **kwargs, vocab_axes=('tensor',), implementation=implementation
    )
    return jax.lax.psum((loss, sums), 'data')

  rows = jax.P('data')
  sharded = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(rows, jax.P(None, 'tensor'), rows, rows),
    out_specs=jax.P(),
  )
  actual, expected = (
    jax.jit(jax.value_and_grad(f, (0, 1, 3), has_aux=True))(*_inputs())
    for f in (sharded, functools.partial(_reference, **kwargs))
  )
  for a, e in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, e, rtol=1e-5, atol=2e-5)


@settings(max_examples=2, phases=[hypothesis.Phase.generate])
@given(
  num_tokens=st.integers(1, 260),
  width=st.sampled_from([8, 130]),
  vocab=st.integers(1, 260),
  cap=st.sampled_from([None, 3.0]),
)
def test_tpu_kernels_on_shapes_that_blocks_do_not_divide(
  num_tokens, width, vocab, cap
):
  keys = jax.random.split(jax.random.key(num_tokens), 4)
  x = jax.random.normal(keys[0], (1, num_tokens, width))
  head = jax.random.normal(keys[1], (width, vocab)) * width**-0.5
  targets = jax.random.randint(keys[2], (1, num_tokens), 0, vocab)
  weights = jax.random.uniform(keys[3], (1, num_tokens))
  kwargs = dict(z_loss=1e-2, logit_soft_cap=cap)
  small = dict(chunk=128, block_tokens=128, block_vocab=128, rows=128)

  def run(f):
    grad = jax.value_and_grad(f, (0, 1, 3), has_aux=True)
    return jax.jit(grad)(x, head, targets, weights)

  actual = run(
    functools.partial(pallas_tpu.linear_cross_entropy, config=small, **kwargs)
  )
  expected = run(functools.partial(_reference, **kwargs))
  for a, e in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)


def test_largest_logit_may_come_late_and_be_large():
  x = jnp.ones((1, 8, 8))
  head = jnp.zeros((8, 256)).at[:, 250].set(50.0).at[:, 3].set(-50.0)
  targets = jnp.array([[250, 3, 0, 1, 2, 3, 250, 255]])
  weights = jnp.ones((1, 8))

  def run(f):
    grad = jax.value_and_grad(f, (0, 1), has_aux=True)
    return jax.jit(grad)(x, head, targets, weights)

  small = dict(block_vocab=128, rows=128)
  actual = run(functools.partial(pallas_tpu.linear_cross_entropy, config=small))
  for a, e in zip(
    jax.tree.leaves(actual), jax.tree.leaves(run(_reference)), strict=True
  ):
    np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


def test_tpu_kernels_keep_a_chunk_of_exponentials_only():
  shape = jax.ShapeDtypeStruct
  num_tokens, vocab = 1024, 2048
  args = (
    shape((1, num_tokens, 128), jnp.bfloat16),
    shape((128, vocab), jnp.bfloat16),
    shape((1, num_tokens), jnp.int32),
    shape((1, num_tokens), jnp.float32),
  )
  f = _loss_and_grads(implementation='pallas_tpu', chunk=128)
  sizes = list(_sizes(jax.make_jaxpr(f)(*args).jaxpr))
  assert max(sizes) <= max(128 * vocab * 2, num_tokens * 128)
  # One product in all where nothing is differentiated.
  value = functools.partial(linear_cross_entropy, implementation='pallas_tpu')
  assert str(jax.make_jaxpr(value)(*args)).count('pallas_call[') == 1


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(head=jnp.ones((_D + 1, _V))), 'x must be'),
    (dict(targets=jnp.zeros((_B, _T + 1), int)), 'targets'),
    (dict(shards=(3, 1)), 'shards'),
    (dict(chunk=0), 'chunk'),
  ],
)
def test_wrong_arguments(change, message):
  names = ('x', 'head', 'targets', 'weights')
  arguments = dict(zip(names, _inputs(), strict=True)) | change
  args = [arguments.pop(name) for name in names]
  with pytest.raises(ValueError, match=message):
    # The shape checks of the tests would come first.
    inspect.unwrap(linear_cross_entropy)(*args, **arguments)
