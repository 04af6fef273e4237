"""How long collectives take over the links between chips.

Links and their bandwidth are in `chips`. Along one dimension of the network a
ring of chips uses the links of both directions, a line, whose end chips have
one link only, those of one; dimensions work at the same time. Then a gather or
a scatter of b bytes among n devices takes b (n - 1) / n over the bandwidth of
what a chip can use, a sum of everything (all-reduce) twice that (Austin et al.,
"How to Scale Your Model", https://jax-ml.github.io/scaling-book, section 3).
A permutation takes what its busiest link takes, each pair on the shortest way
through one dimension after the other.
"""

from collections.abc import Sequence
import dataclasses
import math

import numpy as np

from pallas_kernels.tpu_compiler.chips import Chip
from pallas_kernels.tpu_compiler.chips import wraps

# A hop, about; the same source.
_HOP_MS = 1e-3
_Group = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Network:
  """Where the devices of a mesh are.

  Attributes:
    chip: The generation.
    coords: Coordinates of the chip of each device, by position in the mesh.
    shape: Chips of the slice along each dimension.
  """

  chip: Chip
  coords: tuple[tuple[int, ...], ...]
  shape: tuple[int, ...]

  @classmethod
  def of(cls, chip: Chip, coords: Sequence[Sequence[int]]) -> 'Network':
    """The network of a whole slice, or of the part of it that is given."""
    places = tuple(tuple(c) for c in coords)
    return cls(
      chip, places, tuple(max(c) + 1 for c in zip(*places, strict=True))
    )

  def milliseconds(self, op: str, size: int, groups: Sequence[_Group]) -> float:
    """Time of one collective of `size` bytes.

    Args:
      op: Its HLO operation.
      size: The larger of what a device gives and what it gets.
      groups: Devices that communicate, or (source, target) pairs.
    """
    bytes_per_ms = self.chip.ici_gb_per_s * 1e6
    if op == 'collective-permute':
      load, hops = self._permutation(groups)
      return load * size / bytes_per_ms + hops * _HOP_MS
    group = max(groups, key=len)
    n = len(group)
    if n < 2 or max(group) >= len(self.coords):
      return 0.0
    places = sorted({self.coords[i] for i in group})
    if len(places) < 2:
      return 0.0  # Both devices of one chip.
    # Devices of a chip share its links.
    size = size * n / len(places)
    n = len(places)
    dims = self._dimensions(places)
    hops = sum(extent - 1 for extent, _ in dims)
    if 'all-to-all' in op:
      # Half of what everybody sends crosses the middle of a dimension.
      crossing = max(extent / (4 * links) for extent, links in dims)
      return size * crossing / bytes_per_ms + hops * _HOP_MS
    links = sum(links for _, links in dims)
    rounds = 2 if op == 'all-reduce' else 1
    moved = rounds * size * (n - 1) / n
    return moved / (links * bytes_per_ms) + rounds * hops * _HOP_MS

  def _dimensions(self, places):
    """Extent and usable links per chip of each dimension that a group spans."""
    found = []
    for d, whole in enumerate(self.shape):
      at = sorted({p[d] for p in places})
      if len(at) < 2:
        continue
      gap = max(b - a for a, b in zip(at, at[1:], strict=False))
      is_ring = len(at) == whole and wraps(self.chip, whole)
      # Between places that are apart, others send over the same links.
      found.append((len(at), (2 if is_ring else 1) / gap))
    if math.prod(extent for extent, _ in found) != len(places):
      return [(len(places), 1.0)]  # No box: one line through all of it.
    return found

  def _permutation(self, pairs):
    """Messages on the busiest link, and the longest way in hops."""
    loads: dict[tuple[tuple[int, ...], int, int], int] = {}
    longest = 0
    for pair in pairs:
      if max(pair) >= len(self.coords):
        return 0, 0
      at, target = (list(self.coords[i]) for i in pair)
      hops = 0
      for d, whole in enumerate(self.shape):
        step = int(np.sign(target[d] - at[d]))
        way = abs(target[d] - at[d])
        if wraps(self.chip, whole) and 2 * way > whole:
          step = -step
        while at[d] != target[d]:
          link = tuple(at), d, step
          loads[link] = loads.get(link, 0) + 1
          at[d] = (at[d] + step) % whole
          hops += 1
      longest = max(longest, hops)
    return max(loads.values(), default=0), longest
