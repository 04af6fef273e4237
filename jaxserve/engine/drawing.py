"""From the logits of a step to tokens and their log-probabilities.

Letters: U rows (one per token that is sampled or looked up), V vocab, n likely
tokens returned.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
import numpy as np

from jaxserve.engine import row_state
from jaxserve.engine.row_state import RowSizes
from jaxserve.engine.row_state import RowStore
from jaxserve.samplers import processors
from jaxserve.samplers.base import Rows
from jaxserve.samplers.base import Sampler


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Wanted:
  """What is to be said about each row; fields of `Layout`."""

  num_logprobs: Int[Array, 'U']
  target: Int[Array, 'U']
  wants_processed: Int[Array, 'U']


@dataclasses.dataclass(frozen=True)
class Sampled:
  """Tokens of one step, on the host; of several, in a leading dimension K.

  Attributes:
    tokens: `[U]`: what was sampled, or the target; -1 in steps that a row took
      no part in.
    logprobs: `[U]`, of these tokens, where wanted.
    top_ids: `[U, n]`: the likeliest tokens, best first, where wanted.
    top_logprobs: `[U, n]`.
    is_finite: `[U]`: False where logits were NaN or +inf, or a mask left no
      token: the token is 0 then, and means nothing.
  """

  tokens: np.ndarray
  logprobs: np.ndarray
  top_ids: np.ndarray
  top_logprobs: np.ndarray
  is_finite: np.ndarray

  def steps(self) -> list['Sampled']:
    """Each step of several by itself; the only one, of one."""
    if self.tokens.ndim == 1:
      return [self]
    parts = zip(
      *(getattr(self, f.name) for f in dataclasses.fields(self)), strict=True
    )
    return [Sampled(*part) for part in parts]

  @property
  def num_valid(self) -> np.ndarray:
    """`[U]`: of several steps, how many a row took part in, the first ones."""
    return (self.tokens >= 0).sum(0)


# `(logits [U, V], rows, wanted, store) -> (tokens [U], packed [U, 3 + 2n])`.
Draw = Callable[[jax.Array, Rows, Wanted, RowStore], tuple[jax.Array, ...]]


def drawing(
  sampler: Sampler,
  sizes: RowSizes,
  mesh: jax.sharding.Mesh,
  num_logprobs: int,
) -> Draw:
  """Draws tokens and packs what the host wants to know into one array."""

  def draw(logits, rows, wanted, store):
    def process():
      processed = processors.process(
        logits, rows, row_state.unpack(sizes, store)
      )
      # A mask may hide what is not finite.
      both = processors.can_draw(logits) & processors.can_draw(processed)
      return processed, both

    processed, is_finite = jax.lax.cond(
      jnp.any(rows.features != 0),
      process,
      lambda: (logits, processors.can_draw(logits)),
    )
    tokens = jnp.where(is_finite, sampler(processed, rows), 0)
    tokens = jnp.where(wanted.target < 0, tokens, wanted.target)
    logprobs = jax.lax.cond(
      jnp.any(wanted.num_logprobs >= 0),
      lambda: _logprobs(
        sampler, num_logprobs, logits, processed, tokens, rows, wanted
      ),
      lambda: jnp.zeros((len(tokens), 1 + 2 * num_logprobs), jnp.int32),
    )
    head = jnp.stack([tokens, is_finite.astype(jnp.int32)], axis=-1)
    return tokens, jnp.concatenate([head, logprobs], axis=-1)

  return _split_rows(draw, mesh)


def unpack(packed: np.ndarray, num_logprobs: int) -> Sampled:
  """Reads the packed array of a step, or of several."""
  floats, n = packed.view(np.float32), num_logprobs
  return Sampled(
    tokens=packed[..., 0],
    logprobs=floats[..., 2],
    top_ids=packed[..., 3 : 3 + n],
    top_logprobs=floats[..., 3 + n :],
    is_finite=packed[..., 1] != 0,
  )


def _logprobs(sampler, n, logits, processed, tokens, rows, wanted):
  bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.int32)
  own = lambda: jax.nn.log_softmax(logits, axis=-1)
  drawn_from = lambda: jnp.where(
    wanted.wants_processed[:, None] != 0,
    sampler.distribution(processed, rows),
    own(),
  )
  logprobs = jax.lax.cond(jnp.any(wanted.wants_processed != 0), drawn_from, own)
  chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)
  values, ids = jax.lax.top_k(logprobs, n)
  return jnp.concatenate([bits(chosen), ids, bits(values)], axis=-1)


def _split_rows(draw: Draw, mesh: jax.sharding.Mesh) -> Draw:
  """Each device draws its share of the rows, from whole vocabularies.

  One exchange of the logits then replaces one of counts for every step of every
  cut-off. Rows that do not divide, as in a small bucket, are drawn everywhere.
  """
  if mesh.size == 1:
    return draw

  def split(logits, rows, wanted, store):
    divides = logits.shape[0] % mesh.size == 0
    spec = jax.P(mesh.axis_names if divides else None)
    return jax.shard_map(
      draw,
      mesh=mesh,
      in_specs=(spec, spec, spec, jax.P()),
      out_specs=spec,
      check_vma=False,
    )(logits, rows, wanted, store)

  return split
