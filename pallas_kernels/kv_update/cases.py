"""Named inputs shared by the contract test and the benchmark.

See `ragged_paged_attention/cases.py` for what a case is. `TPU` has model shapes
to compile: abstract arrays, and values where they steer the kernel.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def slots(rng, runs, num_pages, page_size):
  """Slots of runs of new tokens: `(position of the first, how many)` each."""
  pages = iter(rng.permutation(num_pages))
  out = []
  for start, length in runs:
    positions = np.arange(start, start + length)
    table = {p: next(pages) for p in np.unique(positions // page_size)}
    page = np.array([table[p] for p in positions // page_size], int)
    out.append(page * page_size + positions % page_size)
  return np.concatenate(out).astype(np.int32)


def _case(
  key,
  *,
  slot=None,
  runs=(),
  num_pages=12,
  k=2,
  h=16,
  page_size=4,
  layers=2,
  dtype='float32',
  pages=None,
):
  keys = jax.random.split(key, 4)
  rng = np.random.default_rng(0)
  slot = slots(rng, runs, num_pages, page_size) if slot is None else slot
  shape = (layers, num_pages, k, page_size, h)
  pool = [jax.random.normal(x, shape).astype(pages or dtype) for x in keys[:2]]
  new = [jax.random.normal(x, (len(slot), k, h), dtype) for x in keys[2:]]
  scales = [None, None]
  if pages is not None:
    scales = [jax.random.uniform(x, shape[:4]) for x in keys[:2]]
  return dict(
    args=(*pool, jnp.int32(layers - 1), jnp.array(slot), *new, *scales),
    kwargs={},
  )


_RUNS = ((3, 1), (0, 9), (6, 6), (11, 1))
SMALL = {
  name: functools.partial(_case, **kw)
  for name, kw in {
    'decode': dict(runs=((5, 1), (3, 1), (0, 1))),
    'mixed': dict(runs=_RUNS),
    'dropped': dict(slot=[19, 0, -1, 7, 3, -1, 12, 48, 1000]),
    'same_page_again': dict(slot=[0, 40, 1, 2, 41, 3, 5, 4]),
    'bf16': dict(runs=((30, 40), (1, 1)), dtype='bfloat16', page_size=16),
    'bf16_odd': dict(runs=_RUNS, dtype='bfloat16', page_size=5, h=24, k=3),
    'int8': dict(runs=_RUNS, page_size=8, pages='int8'),
    'fp8': dict(
      runs=((3, 40), (31, 2)), page_size=32, pages='float8_e4m3fn', h=128
    ),
    'int4': dict(runs=_RUNS, page_size=8, pages='int4'),
  }.items()
}
_LLAMA = dict(k=8, h=128, layers=1, dtype='bfloat16')
MODEL = {
  'cpu_decode_b32': functools.partial(
    _case,
    runs=tuple((p, 1) for p in range(60, 92)),
    num_pages=512,
    page_size=32,
    k=4,
    h=64,
    layers=8,
  ),
  'llama3_8b_decode_b64': functools.partial(
    _case, runs=((2047, 1),) * 64, num_pages=8192, page_size=16, **_LLAMA
  ),
}


def _abstract(*, runs, page_size, layers=4, num_pages=4096, k=8, h=128):
  """As `_case`, of bfloat16 arrays without values."""
  rng = np.random.default_rng(0)
  slot = slots(rng, runs, num_pages, page_size)
  pool = jax.ShapeDtypeStruct(
    (layers, num_pages, k, page_size, h), jnp.bfloat16
  )
  new = jax.ShapeDtypeStruct((len(slot), k, h), jnp.bfloat16)
  return dict(
    args=(pool, pool, jnp.int32(1), jnp.array(slot), new, new, None, None),
    kwargs={},
  )


TPU = {
  'decode_b64_page16': functools.partial(
    _abstract, runs=((2047, 1),) * 64, page_size=16
  ),
  'prefill_4k_page16': functools.partial(
    _abstract, runs=((0, 4096),), page_size=16
  ),
  'mixed_b32_2k_page128': functools.partial(
    _abstract,
    runs=((2000, 1),) * 32 + ((1000, 2048),),
    page_size=128,
    layers=1,
  ),
}
