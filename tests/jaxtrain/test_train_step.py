"""Any mesh, any number of parts: losses as of plain optax on one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain import train_state as train_state_lib
from jaxtrain import train_step as train_step_lib
from jaxtrain.models.attention import Causal
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.config import MoE
from jaxtrain.models.transformer import Transformer
from jaxtrain.optimizers.vrgd import vrgd
from jaxtrain.parallel import context as context_schemes
from jaxtrain.parallel.context.base import Context
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import constrainer
from jaxtrain.sharding import make_mesh

_B, _T, _V = 8, 16, 64
_RULES = PRESETS['default']
_Z_LOSS = 1e-3
_DENSE = ModelConfig(
  vocab_size=_V,
  embed_dim=32,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=48,
  max_seq_len=_T,
  logit_soft_cap=10.0,
)
_MOE = dataclasses.replace(
  _DENSE, moe=MoE(4, 2, mlp_dim=24), tie_embeddings=True
)
_CONFIGS = {'dense': _DENSE, 'moe': _MOE}


_CONTEXTS = {
  'striped ring': Context(context_schemes.get('ring')()),
  'zigzag all-gather': Context(context_schemes.get('all_gather')(), 'zigzag'),
}
_RATE = optax.linear_schedule(3e-3, 0.0, 100)


def _tx():
  return optax.adamw(_RATE, b2=0.95, weight_decay=0.1)


def _batches(count):
  rng = np.random.default_rng(0)
  for _ in range(count):
    tokens = rng.integers(0, _V, (_B, _T + 1)).astype(np.int32)
    # Two documents a row, the second starting anywhere.
    starts = rng.integers(1, _T, (_B, 1))
    column = np.arange(_T)[None]
    is_second = column >= starts
    yield dict(
      tokens=tokens[:, :-1],
      targets=tokens[:, 1:],
      positions=np.where(is_second, column - starts, column).astype(np.int32),
      segment_ids=(1 + is_second).astype(np.int32),
      weights=(column != starts - 1).astype(np.float32)
      * rng.integers(0, 2, (_B, 1)),
    )


_BATCHES = list(_batches(10))


@functools.cache
def _first_state(name):
  mesh = make_mesh()
  model = Transformer(_CONFIGS[name])
  return jax.tree.map(
    np.asarray, train_state_lib.init_state(model, _tx(), mesh, _RULES)
  )


@functools.cache
def _program(name, spec, dtype='float32', accumulation=1, context=None):
  """The compiled step, and the shardings of its state and its batch."""
  mesh = make_mesh(spec)
  model = Transformer(
    _CONFIGS[name], dtype=dtype, shard=constrainer(mesh, _RULES)
  )
  step = train_step_lib.make_train_step(
    model,
    _tx(),
    mesh,
    _RULES,
    z_loss=_Z_LOSS,
    learning_rate=_RATE,
    accumulation=accumulation,
    context=_CONTEXTS.get(context),
  )
  abstract = train_state_lib.state_spec(model, _tx(), mesh, _RULES)
  batches = train_step_lib.batch_shardings(mesh, _RULES)
  first = jax.device_put(_BATCHES[0], batches)
  compiled = step.lower(abstract.abstract, first).compile()
  return compiled, abstract.shardings, batches


@functools.cache
def _run(name, spec, count, **options):
  """Last state and the metrics of `count` steps."""
  step, shardings, batches = _program(name, spec, **options)
  state, history = jax.device_put(_first_state(name), shardings), []
  for batch in _BATCHES[:count]:
    state, metrics = step(state, jax.device_put(batch, batches))
    history.append({k: float(v) for k, v in metrics.items()})
  return state, history


@pytest.fixture(scope='module', params=list(_CONFIGS))
def plain(request):
  """Ten steps of plain optax on all logits: config, parameters, metrics."""
  config = _CONFIGS[request.param]
  model = Transformer(config)
  tx = optax.chain(optax.clip_by_global_norm(1.0), _tx())
  params = _first_state(request.param).params
  opt_state = tx.init(params)

  def loss_fn(params, batch):
    logits, _ = model.apply(
      {'params': params},
      batch['tokens'],
      batch['positions'],
      Causal(batch['segment_ids'], implementation='reference'),
    )
    nll = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['targets']
    )
    z = _Z_LOSS * jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.sum((nll + z) * batch['weights']) / jnp.sum(batch['weights'])

  @jax.jit
  def step(params, opt_state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    norm = optax.tree.norm(grads)
    return optax.apply_updates(params, updates), opt_state, loss, norm

  history = []
  for batch in _BATCHES:
    params, opt_state, loss, norm = step(params, opt_state, batch)
    history.append((float(loss), float(norm)))
  return request.param, params, history


_MESHES = {
  'dense': ('', 'data=2,fsdp=2,tensor=2', 'fsdp=2,context=2,tensor=2'),
  'moe': ('fsdp=2,expert=2,tensor=2',),
}


def test_ten_losses_equal_plain_optax(plain):
  name, params, expected = plain
  # Gradients above the limit must have been met, or clipping is not tested.
  assert max(norm for _, norm in expected) > 1.0
  for spec in _MESHES[name]:
    state, history = _run(name, spec, 10)
    for got, (loss, norm) in zip(history, expected, strict=True):
      assert got['loss'] == pytest.approx(loss, abs=1e-5), spec
      assert got['grad_norm'] == pytest.approx(norm, rel=1e-4), spec
    assert int(state.step) == 10
    for a, e in zip(
      jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True
    ):
      np.testing.assert_allclose(a, e, atol=2e-4)


def test_accumulation_equals_the_whole_batch():
  _, whole = _run('dense', '', 10)
  _, parts = _run('dense', 'data=2', 3, accumulation=4)
  for a, e in zip(parts, whole[:3], strict=True):
    assert a == pytest.approx(e, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize('context', _CONTEXTS)
def test_sequences_in_another_layout(context):
  """Two documents a row: masks, positions and labels all follow the tokens."""
  _, whole = _run('dense', '', 10)
  _, parts = _run(
    'dense', 'data=2,context=4', 4, accumulation=2, context=context
  )
  for a, e in zip(parts, whole[:4], strict=True):
    assert a == pytest.approx(e, abs=1e-5, rel=1e-5)


def test_metrics():
  _, history = _run('dense', '', 10)
  for i, (got, batch) in enumerate(zip(history, _BATCHES, strict=True)):
    assert got['weight'] == batch['weights'].sum()
    assert got['learning_rate'] == pytest.approx(3e-3 * (1 - i / 100))
    assert got['finite'] == 1
  first = history[0]
  assert 0 <= first['accuracy'] < 0.2
  normaliser = (first['loss'] - first['nll']) / _Z_LOSS
  assert normaliser == pytest.approx(np.log(_V) ** 2, rel=0.4)


def test_bfloat16_compute_keeps_float32_state():
  state, history = _run('dense', '', 5, dtype='bfloat16')
  _, exact = _run('dense', '', 10)
  for leaf in jax.tree.leaves((state.params, state.opt_state)):
    assert leaf.dtype in (jnp.float32, jnp.int32)
  for a, e in zip(history, exact[:5], strict=True):
    assert a['loss'] == pytest.approx(e['loss'], rel=2e-2)
    assert a['loss'] != e['loss']


def test_two_programs_do_what_one_does():
  mesh = make_mesh('fsdp=2')
  model = Transformer(_DENSE, shard=constrainer(mesh, _RULES))
  tx = vrgd(1e-2, base='adam')
  options = dict(
    accumulation=2,
    noise_scale=True,
    mean_square=True,
    z_loss=_Z_LOSS,
    learning_rate=_RATE,
  )
  step = train_step_lib.make_train_step(model, tx, mesh, _RULES, **options)
  split = train_step_lib.make_split_step(model, tx, mesh, _RULES, **options)
  one = train_state_lib.init_state(model, tx, mesh, _RULES)
  two = train_state_lib.init_state(model, tx, mesh, _RULES)
  shardings = train_step_lib.batch_shardings(mesh, _RULES)
  # Ends with one that is not finite, which must change nothing in either.
  bad = dict(_BATCHES[2], weights=np.full((_B, _T), np.nan, np.float32))
  for batch in (*_BATCHES[:2], bad):
    batch = jax.device_put(batch, shardings)
    one, wanted = step(one, batch)
    before = jax.tree.map(np.array, two)
    gradients = split.gradients(two, batch)
    jax.tree.map(np.testing.assert_array_equal, two, before)
    old, (two, metrics) = two, split.update(two, gradients)
    assert all(x.is_deleted() for x in jax.tree.leaves(old))
    assert metrics.keys() == wanted.keys()
    for name in metrics:
      np.testing.assert_allclose(
        metrics[name], wanted[name], rtol=1e-6, err_msg=name
      )
  assert metrics['finite'] == 0 and two.step == 2
  jax.tree.map(np.testing.assert_array_equal, two, before)
  for a, b in zip(jax.tree.leaves(two), jax.tree.leaves(one), strict=True):
    assert a.sharding == b.sharding
    error = np.linalg.norm(np.float64(a) - np.float64(b))
    assert error <= 1e-6 * np.linalg.norm(np.float64(b))


def test_non_finite_step_leaves_the_state_as_it_was():
  step, shardings, batches = _program('dense', 'data=2,fsdp=2,tensor=2')
  before = _first_state('dense')
  weights = np.full_like(_BATCHES[0]['weights'], np.inf)
  bad = jax.device_put(_BATCHES[0] | dict(weights=weights), batches)
  after, metrics = step(jax.device_put(before, shardings), bad)
  assert float(metrics['finite']) == 0
  jax.tree.map(np.testing.assert_array_equal, before, after)


def test_state_is_donated_and_sharded():
  step, shardings, batches = _program('dense', 'data=2,fsdp=2,tensor=2')
  state = jax.device_put(_first_state('dense'), shardings)
  step(state, jax.device_put(_BATCHES[0], batches))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
  whole = sum(leaf.nbytes for leaf in jax.tree.leaves(_first_state('dense')))
  batch = sum(a.nbytes for a in _BATCHES[0].values())
  argument_bytes = step.memory_analysis().argument_size_in_bytes
  # A quarter of parameters and moments; norm scales are in two parts only.
  assert argument_bytes < 1.2 * (whole + batch) / 4


def test_eval_step_sums():
  mesh = make_mesh('data=2,fsdp=2,tensor=2')
  model = Transformer(_DENSE, shard=constrainer(mesh, _RULES))
  _, shardings, batches = _program('dense', 'data=2,fsdp=2,tensor=2')
  params = jax.device_put(_first_state('dense').params, shardings.params)
  sums = train_step_lib.make_eval_step(model, mesh, _RULES)(
    params, jax.device_put(_BATCHES[0], batches)
  )
  _, history = _run('dense', '', 10)
  weight = float(sums['weight'])
  assert weight == history[0]['weight']
  assert float(sums['nll']) / weight == pytest.approx(
    history[0]['nll'], abs=1e-5
  )


def _trace(spec='', batch=None, **options):
  mesh = make_mesh(spec)
  model = Transformer(_DENSE)
  step = train_step_lib.make_train_step(model, _tx(), mesh, _RULES, **options)
  jax.eval_shape(step, _first_state('dense'), batch or _BATCHES[0])


def test_wrong_arguments():
  with pytest.raises(ValueError, match='accumulation=0'):
    _trace(accumulation=0)
  with pytest.raises(ValueError, match='does not divide'):
    _trace(accumulation=3)
  with pytest.raises(ValueError, match='divi'):
    _trace('data=8', {k: v[:6] for k, v in _BATCHES[0].items()})
