"""How long a piece of work takes at least, by the measured peaks."""

from typing import Any

from experiments.benchmarks.gpu_record import Section


def figures(
  section: Section,
  us: float,
  *,
  flops: float = 0.0,
  num_bytes: float = 0.0,
  peak: str = 'bf16_flops',
) -> dict[str, Any]:
  """What a row says of a time.

  Args:
    section: Knows the peaks, if they were measured.
    us: Microseconds that the work took.
    flops: Useful ones.
    num_bytes: That must move at least.
    peak: Which rate of products is the limit.

  Returns:
    'tflops' and 'gb_per_s', where there is such work; and the 'share' that the
    floor, which is the 'bound', is of the time.
  """
  found = {}
  if flops:
    found['tflops'] = 1e-6 * flops / us
  if num_bytes:
    found['gb_per_s'] = 1e-3 * num_bytes / us
  peaks = section.peaks()
  floors = {
    bound: 1e6 * amount / peaks[rate]
    for bound, amount, rate in (
      ('products', flops, peak),
      ('memory', num_bytes, 'bytes_per_s'),
    )
    if amount and rate in peaks
  }
  if floors:
    bound = max(floors, key=floors.get)
    found |= dict(share=floors[bound] / us, bound=bound)
  return found
