"""Taps: the residual stream, at no cost to whom they do not interest."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.models import transformer
from jaxtrain.models.attention import Causal
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.layers import RMSNorm
from jaxtrain.models.rope import sin_cos

_CONFIG = ModelConfig(
  vocab_size=64,
  embed_dim=32,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=48,
  max_seq_len=32,
  embed_scale=True,
)
_TOKENS = jnp.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


@pytest.fixture(scope='module')
def params():
  model = transformer.Transformer(_CONFIG)
  variables = nn.unbox(model.init(jax.random.key(0), _TOKENS))
  assert variables.keys() == {'params'}
  return variables['params']


def test_taps_are_the_states_between_layers(params):
  """Against blocks applied one after the other, without the scan."""
  c = _CONFIG
  (logits, _), variables = transformer.Transformer(c).apply(
    {'params': params}, _TOKENS, mutable=['intermediates']
  )
  names = transformer.tap_names(c)
  assert names == (
    'embeddings',
    'layers.0.output',
    'layers.1.output',
    'layers.2.output',
    'final_norm',
  )
  got = transformer.taps(variables['intermediates'], names)
  x = params['embed']['embedding'][_TOKENS] * 32**0.5
  expected = [x]
  positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
  table = sin_cos(positions, c.rope, c.head_dim)
  tables = jax.tree.map(lambda t: t[None], table)
  block = transformer.Block(c, attend=Causal())
  for i in range(3):
    layer = jax.tree.map(lambda p: p[i], params['layers'])
    (x, _), _ = block.apply(
      {'params': layer}, (x, None), (jnp.int32(i), None, 0), positions, tables
    )
    expected.append(x)
  norm = RMSNorm(epsilon=c.norm_eps, plus_one=c.norm_plus_one)
  expected.append(norm.apply({'params': params['final_norm']}, x))
  for name, a, b in zip(names, got, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)
  head = transformer.output_head(params)
  np.testing.assert_allclose(logits, got[-1] @ head, rtol=1e-4, atol=1e-5)


def test_the_selection_does_not_cut_the_last_tap(params):
  (logits, _), variables = transformer.Transformer(_CONFIG).apply(
    {'params': params},
    _TOKENS,
    select=lambda x: x[:, -1:],
    mutable=['intermediates'],
  )
  [state] = transformer.taps(variables['intermediates'], ['final_norm'])
  assert state.shape == (2, 6, 32) and logits.shape == (2, 1, 64)


@pytest.mark.parametrize('is_training', [False, True])
def test_without_taps_the_program_is_as_if_there_were_none(
  params, monkeypatch, is_training
):
  policy = jax.checkpoint_policies.nothing_saveable if is_training else None
  model = transformer.Transformer(_CONFIG, remat=policy)

  def traced(mutable):
    """Text of value, or gradient; traced anew every time."""

    def loss(params):
      out = model.apply({'params': params}, _TOKENS, mutable=mutable)
      out, states = out if mutable else (out, ())
      return out[0].sum() + sum(x.sum() for x in jax.tree.leaves(states))

    run = jax.grad(loss) if is_training else loss
    return str(jax.make_jaxpr(run)(params))

  plain, tapped = traced(False), traced(['intermediates'])
  assert plain != tapped
  monkeypatch.setattr(nn.Module, 'sow', lambda *_, **__: False)
  assert traced(False) == plain
  if not is_training:  # Else the layers' inputs are kept for the gradient.
    assert 'f32[3,2,6,32]' in tapped and 'f32[3,2,6,32]' not in plain
