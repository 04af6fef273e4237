"""Decoding from a paged cache: 64 sequences of 4,096 tokens, one query each.

The floor is reading the pages once. Pages are scattered over the pool; those of
eight bits have a float32 scale for each token and head, which is read too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import gpu_floor
from experiments.benchmarks.gpu_record import Section
from experiments.benchmarks.gpu_timing import Contender
from experiments.benchmarks.gpu_timing import JaxCalls
from experiments.benchmarks.gpu_timing import compare
from experiments.benchmarks.gpu_timing import relative_error
from pallas_kernels.ragged_paged_attention import ragged_paged_attention
from pallas_kernels.ragged_paged_attention.cases import quantize

_HEADS, _KV_HEADS, _HEAD_DIM = 32, 8, 128
_SEQUENCES, _LENGTH = 64, 4096
_DTYPES = ('bfloat16', 'float8_e4m3fn')
_PAGE_SIZES = (64, 16, 128)
# Sequences that are checked.
_CHECKED = 4
_TOLERANCE = 1e-2
# Calls of a run: they differ in their queries.
_CALLS = 4


def run(section: Section) -> None:
  """A row for each page size and dtype of the pages."""
  for page_size in _PAGE_SIZES[:1] if section.smoke else _PAGE_SIZES:
    for dtype in _DTYPES:
      _row(section, page_size, dtype)
    _compare_dtypes(section, page_size)


def _name(page_size, dtype):
  return f'decode, pages of {page_size} tokens, {dtype}'


def _row(section, page_size, dtype):
  sequences, length = (4, 128) if section.smoke else (_SEQUENCES, _LENGTH)
  queries, pools, scales, rest = _arrays(
    calls=1 if section.smoke else _CALLS,
    sequences=sequences,
    length=length,
    page_size=page_size,
    dtype=dtype,
  )
  expected = []

  def check(out):
    if not expected:
      expected.append(_expected(queries[0], pools, scales, rest[3]))
    return relative_error(out[:_CHECKED], expected[0])

  def calls(implementation):
    def attend(q, pools, scales, rest):
      return ragged_paged_attention(
        *(q, *pools, *rest, None, None),
        *(scales or (None, None)),
        scale=_HEAD_DIM**-0.5,
        implementation=implementation,
      )

    return JaxCalls(attend, *((q, pools, scales, rest) for q in queries))

  read = sum(x.nbytes for x in (*pools, *(scales or ())))
  num_bytes = read + 2.0 * queries[0].nbytes
  contenders = {
    name: Contender(
      functools.partial(calls, implementation),
      check,
      _TOLERANCE,
      is_ours=name == 'ours',
    )
    for name, implementation in (
      ('ours', section.implementation),
      ('xla', 'xla'),
    )
  }
  compare(
    section,
    _name(page_size, dtype),
    contenders,
    lambda us: dict(
      **gpu_floor.figures(section, us, num_bytes=num_bytes),
      tokens_per_s=1e6 * sequences / us,
    ),
  )


def _arrays(*, calls, sequences, length, page_size, dtype):
  """Queries of some calls; pools; scales or `None`; what else the op takes."""
  keys = jax.random.split(jax.random.key(0), calls + 2)
  pages = length // page_size
  order = np.random.default_rng(0).permutation(sequences * pages)
  table = jnp.asarray(order.reshape(sequences, pages), jnp.int32)
  shape = (1, sequences * pages, _KV_HEADS, page_size, _HEAD_DIM)
  pools = [jax.random.normal(k, shape, jnp.bfloat16) for k in keys[:2]]
  scales = None
  if dtype != 'bfloat16':
    narrow = [jax.jit(quantize, static_argnums=1)(x, dtype) for x in pools]
    pools, scales = zip(*narrow, strict=True)
  queries = [
    jax.random.normal(k, (sequences, _HEADS, _HEAD_DIM), jnp.bfloat16)
    for k in keys[2:]
  ]
  start = jnp.arange(sequences + 1, dtype=jnp.int32)
  kv_len = jnp.full(sequences, length, jnp.int32)
  return queries, tuple(pools), scales, (jnp.int32(0), start, kv_len, table)


@jax.jit
def _expected(q, pools, scales, table):
  """Of the first sequences, from dense keys and values in float32."""
  table = table[:_CHECKED]
  q = q[:_CHECKED].astype(jnp.float32)
  scales = scales or (None, None)

  def dense(pool, scale):
    x = pool[0][table].astype(jnp.float32)
    if scale is not None:
      x *= scale[0][table][..., None]
    # [S, pages, heads, tokens, H] to [S, heads, all tokens, H].
    return x.swapaxes(1, 2).reshape(len(table), x.shape[2], -1, x.shape[-1])

  k, v = (dense(*each) for each in zip(pools, scales, strict=True))
  einsum = functools.partial(jnp.einsum, precision='highest')
  grouped = q.reshape(len(table), k.shape[1], -1, q.shape[-1])
  s = einsum('skgh,skth->skgt', grouped, k) * q.shape[-1] ** -0.5
  out = einsum('skgt,skth->skgh', jax.nn.softmax(s, axis=-1), v)
  return out.reshape(q.shape)


def _compare_dtypes(section, page_size):
  """Notes how much faster pages of eight bits are."""
  rows = [section.find(_name(page_size, d), 'ours') or {} for d in _DTYPES]
  wide, narrow = (row.get('us') for row in rows)
  if wide and narrow and 'speedup_over_bfloat16' not in rows[1]:
    name = rows[1].pop('row')
    rows[1].pop('contender')
    speedup = float(f'{wide / narrow:.4g}')
    section.add(name, 'ours', **rows[1], speedup_over_bfloat16=speedup)
