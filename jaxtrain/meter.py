"""Tokens per second and model FLOPs utilisation."""

from collections.abc import Iterator
import contextlib
import time

from jaxtrain.hardware import Peak


class Meter:
  """Counts finished steps against the time that was spent on them.

  Args:
    flops_per_token: FLOPs of the model, see `train_flops_per_token`.
    peak: Of the mesh, or `None` if it is not known.
  """

  def __init__(self, flops_per_token: float, peak: Peak | None):
    self._flops_per_token = flops_per_token
    self._peak = peak
    # Tokens and seconds, in all and since the last `recent`.
    self._tokens, self._seconds = 0, 0.0
    self._recent_tokens, self._recent_seconds = 0, 0.0
    self._since: float | None = None

  def start(self) -> None:
    """Starts the clock."""
    self._since = time.perf_counter()

  def step(self, num_tokens: int) -> None:
    """Says that one more step is finished.

    Args:
      num_tokens: Positions in its global batch, padding included.
    """
    self._lap()
    self._tokens += num_tokens
    self._recent_tokens += num_tokens

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Does not count the time inside, such as that of an evaluation."""
    self._lap()
    try:
      yield
    finally:
      self.start()

  def recent(self) -> dict[str, float]:
    """Rates since the last call: 'tokens_per_s' and, if known, 'mfu'."""
    rates = self._rates(self._recent_tokens, self._recent_seconds)
    self._recent_tokens, self._recent_seconds = 0, 0.0
    return rates

  def overall(self) -> dict[str, float]:
    """The same since the start."""
    return self._rates(self._tokens, self._seconds)

  def _lap(self):
    now = time.perf_counter()
    elapsed = 0.0 if self._since is None else now - self._since
    self._seconds += elapsed
    self._recent_seconds += elapsed
    self._since = now

  def _rates(self, tokens, seconds):
    if not tokens or not seconds:
      return {}
    tokens_per_s = tokens / seconds
    rates = {'tokens_per_s': tokens_per_s}
    if self._peak is not None:
      flops_per_s = tokens_per_s * self._flops_per_token
      rates['mfu'] = flops_per_s / self._peak.flops_per_s
    return rates
