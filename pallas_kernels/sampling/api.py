"""Public entry point of sampling."""

from jaxtyping import Array, Float, Int

from pallas_kernels.common.dispatch import dispatch


def sampling(
  logits: Float[Array, 'B V'],
  temperature: Float[Array, 'B'],
  top_k: Int[Array, 'B'],
  top_p: Float[Array, 'B'],
  min_p: Float[Array, 'B'],
  uniform: Float[Array, 'B'],
  *,
  implementation: str | None = None,
) -> Int[Array, 'B']:
  """Draws one token per row with temperature, top-k, top-p and min-p.

  * top-k: Fan et al., https://arxiv.org/abs/1805.04833, section 5.
  * top-p: Holtzman et al., https://arxiv.org/abs/1904.09751, equation 2.
  * min-p: Nguyen et al., https://arxiv.org/abs/2407.01082, section 3.

  The cuts apply in this order, each to what the last one kept, after the
  temperature. Tokens that tie at a cut are all kept, and the likeliest always
  is. The token is the one at which the running sum of the kept probabilities
  passes `uniform` (Devroye, "Non-Uniform Random Variate Generation", section
  III.2), over tokens v in the order of `(v % 512, v)`: one random number a row,
  and sums that vector units take as they come.

  Args:
    logits: Unnormalised log-probabilities.
    temperature: Divides the logits; 0 is the first of the largest.
    top_k: How many tokens to keep; 0 is all.
    top_p: Probability of the tokens to keep; 1 is all.
    min_p: Probability of the tokens to keep, as a share of the largest.
    uniform: A random number in [0, 1) per row.
    implementation: 'reference', 'xla', 'pallas_tpu', 'pallas_gpu' or `None`.

  Returns:
    Token ids, int32.

  Raises:
    ValueError: Shapes that do not belong together.
  """
  rows = temperature, top_k, top_p, min_p, uniform
  if {x.shape for x in rows} != {logits.shape[:1]}:
    raise ValueError(
      f'sampling takes one parameter per row of {logits.shape=}, got '
      f'{[x.shape for x in rows]}'
    )
  return dispatch('sampling', logits, *rows, implementation=implementation)
