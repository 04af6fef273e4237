"""Which keeper holds which parity of whose chunks: RAID 5 and 6, in memory.

"Reliable and Efficient In-Memory Fault Tolerance of Large Language Model
Pretraining", Wang et al., https://arxiv.org/abs/2310.12670, calls it RAIM5.
Of n keepers with m rows of parity each cuts its bytes into k = n - m chunks.
There are n stripes of k chunks and m rows, each on a keeper of its own: row r
of stripe s on keeper s + r, chunk j of it on keeper s + m + j (mod n). So the
loss of any m keepers costs a stripe at most m of its n parts, and every keeper
holds m rows: m / (n - m) of the bytes that it protects.
"""

import dataclasses

_ALIGNMENT = 64  # Bytes; a cache line, and any dtype.


@dataclasses.dataclass(frozen=True)
class Stripes:
  """The layout of a group.

  Attributes:
    num_keepers: n.
    num_parity: m.

  Raises:
    ValueError: m is not in 1..n - 1.
  """

  num_keepers: int
  num_parity: int

  def __post_init__(self):
    n, m = self.num_keepers, self.num_parity
    if not 1 <= m < n:
      raise ValueError(
        f'num_parity={m} must be at least 1 and below the number of keepers, '
        f'{n}'
      )

  @property
  def num_data(self) -> int:
    """k, chunks of a stripe, and chunks that a keeper's bytes are cut into."""
    return self.num_keepers - self.num_parity

  def chunk_bytes(self, num_bytes: int) -> int:
    """Length of a chunk of the longest bytes of the group."""
    chunk = -(-num_bytes // self.num_data)
    return -(-chunk // _ALIGNMENT) * _ALIGNMENT

  def stripe_of(self, keeper: int, chunk: int) -> int:
    """The stripe that chunk `chunk` of `keeper` is in, as its chunk `chunk`."""
    return (keeper - self.num_parity - chunk) % self.num_keepers

  def holder(self, stripe: int, part: int) -> int:
    """The keeper of a part of a stripe: chunks first, then rows of parity."""
    if part < self.num_data:
      return (stripe + self.num_parity + part) % self.num_keepers
    return (stripe + part - self.num_data) % self.num_keepers

  def rows(self, keeper: int) -> list[int]:
    """Stripes whose row r of parity `keeper` has, at place r."""
    return [(keeper - r) % self.num_keepers for r in range(self.num_parity)]

  def chunks_for(self, sender: int, receiver: int) -> list[tuple[int, int]]:
    """`(chunk of sender, row of receiver)`, as the receiver's parity needs."""
    return [
      (j, r)
      for r, stripe in enumerate(self.rows(receiver))
      for j in range(self.num_data)
      if self.holder(stripe, j) == sender
    ]
