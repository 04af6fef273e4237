"""Checksums of what every device holds, to find one that computes wrongly.

Devices that hold the same parts of the parameters must hold the same bits: one
that does not has made a silent error (Hochschild et al., "Cores that don't
count", HotOS 2021, https://doi.org/10.1145/3458336.3465297, describe them;
comparing replicas is what MegaScale, Jiang et al.,
https://arxiv.org/abs/2402.15627, and others do; both from memory).

What it cannot find: parameters of which there is one copy only, and an error in
a gradient before it is summed over replicas, for then all are equally wrong.
"""

from collections.abc import Callable
import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

_PRIME = np.uint32(2654435761)  # Of Knuth's multiplicative hash: odd.
# Eight bytes become two words.
_UINT = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def make_fingerprint(tree: Any, mesh: Mesh) -> Callable[[Any], jax.Array]:
  """Builds `fingerprint(tree) -> [mesh.size] uint32`, one per device.

  Each is a checksum of the device's own shards, so no device waits for another.
  Any single bit changes it; two changes cancel with a chance of about 2^-32.

  Args:
    tree: Arrays, or shapes with shardings, on `mesh`.
    mesh: Of all of them.

  Returns:
    A jitted function, its result sharded over all devices.
  """
  specs = jax.tree.map(lambda x: x.sharding.spec, tree)

  def local(tree):
    total = jnp.uint32(0)
    for i, x in enumerate(jax.tree.leaves(tree)):
      total = total * _PRIME + _checksum(x) + jnp.uint32(i)
    return total[None]

  mapped = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(specs,),
    out_specs=P(mesh.axis_names),
    check_vma=False,
  )
  return jax.jit(mapped, out_shardings=NamedSharding(mesh, P(mesh.axis_names)))


def groups(tree: Any, mesh: Mesh) -> dict[int, str]:
  """Device id -> name of the group of devices that hold just the same."""
  parts = {d.id: hashlib.sha256() for d in mesh.devices.flat}
  for leaf in jax.tree.leaves(tree):
    for device, index in _indices(leaf.sharding, leaf.shape).items():
      parts[device.id].update(repr(index).encode())
  return {device: part.hexdigest()[:8] for device, part in parts.items()}


def by_group(
  sums: jax.Array, groups: dict[int, str]
) -> dict[str, tuple[int, ...]]:
  """What `make_fingerprint` gave for this process's devices, by group.

  Args:
    sums: `[mesh.size]`, of all processes.
    groups: Of `groups`.

  Returns:
    Group -> the different checksums of its devices here, ascending. More than
    one are an error within this process.
  """
  found: dict[str, set[int]] = {}
  for shard in sums.addressable_shards:
    group = groups[shard.device.id]
    found.setdefault(group, set()).add(int(shard.data[0]))
  return {group: tuple(sorted(values)) for group, values in found.items()}


def _checksum(x):
  """Sum of the words of an array, each times an odd number of its place."""
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  words = jax.lax.bitcast_convert_type(x, _UINT[x.dtype.itemsize])
  words = words.astype(jnp.uint32).ravel()
  places = jnp.arange(words.size, dtype=jnp.uint32) * 2 + 1
  return jnp.sum(words * (places * _PRIME), dtype=jnp.uint32)


@functools.lru_cache(maxsize=4096)
def _indices(sharding, shape):
  return {
    device: tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
    for device, index in sharding.devices_indices_map(shape).items()
  }
