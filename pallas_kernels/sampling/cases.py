"""Named inputs shared by the contract test and the benchmark.

See `ragged_paged_attention/cases.py` for what a case is. `TPU` has model shapes
to compile: abstract arrays.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def _case(key, *, b=16, v=3000, scale=3.0, round_to=None, masked=0.0, **fixed):
  keys = jax.random.split(key, 6)
  logits = scale * jax.random.normal(keys[0], (b, v))
  if round_to is not None:
    # Many ties.
    logits = jnp.round(logits / round_to) * round_to
  if masked:
    key = jax.random.fold_in(key, 0)
    allowed = jax.random.uniform(key, (b, v)) >= masked
    logits = jnp.where(allowed.at[:, v // 2].set(True), logits, -jnp.inf)
  pick = lambda i, values: jax.random.choice(keys[i], jnp.array(values), (b,))
  rows = dict(
    temperature=pick(1, [0.0, 0.5, 1.0, 2.0]),
    top_k=pick(2, [0, 1, 5, 50, v, 2 * v]),
    top_p=pick(3, [1.0, 0.9, 0.5, 0.01]),
    min_p=pick(4, [0.0, 0.05, 0.5, 1.0]),
    uniform=jax.random.uniform(keys[5], (b,)),
  )
  for name, value in fixed.items():
    rows[name] = jnp.full_like(rows[name], value)
  return dict(args=(logits, *rows.values()), kwargs={})


_ALL = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
SMALL = {
  name: functools.partial(_case, **kw)
  for name, kw in {
    'mixed': dict(),
    'odd_rows': dict(b=5, v=777),
    'tiny_vocabulary': dict(b=3, v=7),
    'ties': dict(v=1024, round_to=1.0),
    'ties_greedy': dict(v=1024, round_to=1.0, temperature=0.0),
    'masked': dict(v=1000, masked=0.9),
    'masked_but_one': dict(v=600, masked=1.0),
    'untruncated': _ALL,
    'top_k': _ALL | dict(top_k=300, b=8),
    'top_p_flat': _ALL | dict(top_p=0.9, scale=0.5, b=8),
    'min_p': _ALL | dict(min_p=0.1),
  }.items()
}
MODEL = {
  'cpu_b32_v32k': functools.partial(
    _case, b=32, v=32000, **_ALL | dict(top_p=0.9, top_k=50)
  ),
  'llama3_b64': functools.partial(
    _case, b=64, v=128256, **_ALL | dict(top_p=0.9, top_k=50)
  ),
}


def _abstract(b, v):
  """Logits without values; k = 50 and p = 0.9 for every row."""
  row = lambda value, dtype=np.float32: np.full((b,), value, dtype)
  return dict(
    args=(
      jax.ShapeDtypeStruct((b, v), jnp.float32),
      row(1.0),
      row(50, np.int32),
      row(0.9),
      row(0.0),
      row(0.5),
    ),
    # As many steps of the searches as typical logits take.
    kwargs=dict(steps=(12, 3, 9, 2)),
  )


TPU = {
  'llama3_b64': functools.partial(_abstract, 64, 128256),
  'gpt2_b16': functools.partial(_abstract, 16, 50257),
}
