"""Rows that ask for nothing, but for what a test names."""

import jax.numpy as jnp
import pytest

from jaxserve.samplers.base import Rows

_NOTHING = dict(
  prompt_len=0,
  features=0,
  temperature=1.0,
  top_k=0,
  top_p=1.0,
  min_p=0.0,
  presence_penalty=0.0,
  frequency_penalty=0.0,
  repetition_penalty=1.0,
  min_position=0,
  seed=0,
)


@pytest.fixture(scope='session')
def make_rows():
  def make(n, **changes):
    """`n` rows, each number given for all of them or one by one."""
    index = jnp.arange(n, dtype=jnp.int32)
    fields = dict(row=index, position=index) | _NOTHING | changes
    dtypes = {
      k: jnp.float32 if isinstance(v, float) else jnp.int32
      for k, v in _NOTHING.items()
    }
    return Rows(
      **{
        k: jnp.broadcast_to(jnp.asarray(v, dtypes.get(k, jnp.int32)), (n,))
        for k, v in fields.items()
      }
    )

  return make
