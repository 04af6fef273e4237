"""Traces of requests: when they come, how long they are, what they share."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from jaxserve.simulate.simulator import Arrival

_VOCAB = 32_000


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Log-normal lengths of prompts and answers.

  The means are those of ShareGPT as Kwon et al. give them
  (https://arxiv.org/abs/2309.06180, figure 11).

  Attributes:
    prompt_mean: Tokens.
    generated_mean: Tokens.
    sigma: Standard deviation of the logarithm of either.
    correlation: Of the two logarithms.
    longest: Neither is longer.
  """

  prompt_mean: float = 161.0
  generated_mean: float = 338.0
  sigma: float = 1.0
  correlation: float = 0.0
  longest: int = 2048

  def draw(
    self, rng: np.random.Generator, count: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of prompts and of answers."""
    a, b = rng.standard_normal((2, count))
    b = self.correlation * a + np.sqrt(1 - self.correlation**2) * b
    lengths = []
    for mean, normal in ((self.prompt_mean, a), (self.generated_mean, b)):
      values = np.exp(np.log(mean) - self.sigma**2 / 2 + self.sigma * normal)
      lengths.append(np.clip(np.rint(values), 1, self.longest).astype(int))
    return tuple(lengths)


def poisson(
  rate: float,
  count: int,
  *,
  lengths: Lengths = Lengths(),
  max_tokens: int | None = None,
  priority: int = 0,
  client: str = '',
  start_s: float = 0.0,
  seed: int = 0,
) -> list[Arrival]:
  """Unrelated prompts, `rate` a second on average from `start_s` on."""
  rng = np.random.default_rng(seed)
  times = start_s + np.cumsum(rng.exponential(1 / rate, count))
  return [
    Arrival(
      time_s=float(time),
      prompt=_tokens(rng, int(p)),
      num_generated=int(g),
      max_tokens=max_tokens,
      priority=priority,
      client=client,
    )
    for time, p, g in zip(times, *lengths.draw(rng, count), strict=True)
  ]


def documents(
  num_documents: int,
  questions: int,
  *,
  document_len: int,
  question_len: int = 32,
  generated: Sequence[int] = (16, 128),
  seed: int = 0,
) -> list[Arrival]:
  """Offline: questions about documents, all there at once, shuffled.

  A question is its document, then its own tokens; answers are of any length
  between the two of `generated`, alike for one document.
  """
  rng = np.random.default_rng(seed)
  arrivals = []
  for _ in range(num_documents):
    document = _tokens(rng, document_len)
    count = int(rng.integers(generated[0], generated[1] + 1))
    for _ in range(questions):
      prompt = document + _tokens(rng, question_len)
      arrivals.append(Arrival(0.0, prompt, count))
  return [arrivals[i] for i in rng.permutation(len(arrivals))]


def _tokens(rng, count):
  return tuple(rng.integers(0, _VOCAB, count).tolist())
