"""Public entry point of linear_cross_entropy."""

import functools

from jaxtyping import Array, Float, Int

from pallas_kernels.common.dispatch import dispatch
from pallas_kernels.linear_cross_entropy.gradient import with_gradients


def linear_cross_entropy(
  x: Float[Array, 'B T D'],
  head: Float[Array, 'D V'],
  targets: Int[Array, 'B T'],
  weights: Float[Array, 'B T'],
  *,
  z_loss: float = 0.0,
  logit_soft_cap: float | None = None,
  chunk: int | None = None,
  shards: tuple[int, int] = (1, 1),
  vocab_axes: tuple[str, ...] = (),
  implementation: str | None = None,
) -> tuple[Float[Array, ''], dict[str, Float[Array, '']]]:
  """Weighted cross-entropy of `softmax(x @ head)`, summed over tokens.

  With logits l = x @ head (soft-capped if asked) and lse = log sum exp(l), a
  token costs `lse - l[target] + z_loss * lse**2`; the last term is the z-loss
  of PaLM (https://arxiv.org/abs/2204.02311, section 5). Products take the dtype
  of `x` and accumulate in float32; everything after them is float32.

  Args:
    x: Final hidden states.
    head: Output projection; cast to the dtype of `x`. Its gradient is summed in
      float32 and returned in its own dtype.
    targets: Token ids to predict, in 0..V-1.
    weights: Factor on each token's loss; 0 leaves a token out.
    z_loss: Factor on the squared log-normaliser.
    logit_soft_cap: c of c * tanh(logits / c), or `None`.
    chunk: Positions of each row whose logits exist at a time, per sequence
      shard; `None` makes that about 512 tokens a device, on a TPU as many as
      its bandwidth asks for.
    shards: Over how many mesh shards B and T are split. The gradient of `head`
      is then summed over each shard's tokens first, and over shards once. For
      programs that XLA partitions; inside `jax.shard_map`, where alone a TPU
      kernel can be, the arrays are a shard's and this is (1, 1).
    vocab_axes: Inside `jax.shard_map`, the mesh axes over which the columns of
      `head` are split, in order. `targets` are ids of the whole vocabulary;
      the tokens are the same on every shard of it.
    implementation: 'reference', 'xla', 'pallas_tpu' or 'pallas_gpu'; `None` is
      the fastest that accepts these inputs where the program will run.

  Returns:
    The weighted sum of the loss, and sums to report, all float32 scalars
    without gradient: 'weight', 'nll' and 'z_loss' (both weighted; they add up
    to the loss) and 'correct', the weight of tokens whose target no other
    token's logit exceeds.

  Raises:
    ValueError: Shapes that do not fit, or `shards` that do not divide B and T.
  """
  b, t = x.shape[:2]
  if x.ndim != 3 or head.ndim != 2 or x.shape[2] != head.shape[0]:
    raise ValueError(
      f'x must be [B, T, D] and head [D, V], not {x.shape} and {head.shape}'
    )
  if targets.shape != (b, t) or weights.shape != (b, t):
    raise ValueError(
      f'targets {targets.shape} and weights {weights.shape} must be [B, T] = '
      f'{(b, t)}'
    )
  if b % shards[0] or t % shards[1]:
    raise ValueError(f'{shards=} do not divide [B, T] = {(b, t)}')
  if chunk is not None and chunk < 1:
    raise ValueError(f'chunk={chunk} must be at least 1')
  static = dict(
    z_loss=z_loss,
    logit_soft_cap=logit_soft_cap,
    chunk=chunk,
    shards=shards,
    vocab_axes=vocab_axes,
  )
  name = 'linear_cross_entropy'
  if implementation is not None:
    return dispatch(
      name, x, head, targets, weights, implementation=implementation, **static
    )
  function = lambda f: functools.partial(dispatch, name, function=f, **static)
  return with_gradients(
    function('linear_cross_entropy_value'),
    function('linear_cross_entropy_gradients'),
    x,
    head,
    targets,
    weights,
    vocab_axes,
  )
