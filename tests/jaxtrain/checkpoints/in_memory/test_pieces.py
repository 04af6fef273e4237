"""Every element of every array goes to one keeper of a process that has it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.checkpoints.in_memory import pieces

_SHAPES = [(), (0, 3), (5,), (64, 1024), (2, 8, 4096), (8, 3)]
_SPECS = [(), (None,), ('x',), (None, 'x'), (('x', 'y'),), ('y', 'x')]


def _process_of(device):
  return device.id // 2  # Four processes of two devices.


def _leaves():
  mesh = jax.make_mesh((4, 2), ('x', 'y'))
  leaves = {}
  for shape in _SHAPES:
    for spec in _SPECS:
      if len(spec) > len(shape):
        continue
      sharding = jax.sharding.NamedSharding(mesh, jax.P(*spec))
      try:
        leaf = jax.device_put(np.zeros(shape, np.float32), sharding)
      except ValueError:  # The mesh does not divide it.
        continue
      leaves[f'{shape} {spec}'] = leaf
  leaves['host'] = np.zeros((4, 5), jnp.bfloat16)
  return leaves


@pytest.mark.parametrize('num_keepers', [4, 8])
def test_every_element_once(num_keepers):
  leaves = _leaves()
  assert len(leaves) > 15
  owner_of = pieces.owners(num_keepers, 4)
  layout = pieces.make_layout(leaves, owner_of, _process_of)
  seen = {name: np.zeros(leaf.shape, int) for name, leaf in leaves.items()}
  for keeper, held in enumerate(layout.pieces):
    end = 0
    for piece in held:
      leaf = leaves[piece.leaf]
      index = tuple(slice(a, b) for a, b in piece.rectangle)
      seen[piece.leaf][index] += 1
      start, stop = pieces.byte_range(
        piece, piece.rectangle, leaf.dtype.itemsize
      )
      assert start == piece.offset >= end and start % 64 == 0
      assert stop - start == np.asarray(leaf)[index].nbytes
      end = stop
      if isinstance(leaf, jax.Array):
        assert any(
          _process_of(shard.device) == owner_of[keeper]
          and pieces.intersect(
            piece.rectangle, pieces.to_rectangle(shard.index, leaf.shape)
          )
          == piece.rectangle
          for shard in leaf.addressable_shards
        )
      else:
        assert owner_of[keeper] == 0
    assert end <= layout.num_bytes[keeper]
  for name, count in seen.items():
    assert (count == 1).all(), name
  # Evenly: what parity costs is as much as the largest has.
  assert max(layout.num_bytes) < 1.1 * np.mean(layout.num_bytes)


def test_part_of_a_piece_is_found_among_its_bytes():
  rng = np.random.default_rng(0)
  for _ in range(50):
    lengths = rng.integers(1, 6, rng.integers(0, 4))
    start = rng.integers(0, 9, lengths.size)
    whole = tuple(
      (int(a), int(a + n)) for a, n in zip(start, lengths, strict=True)
    )
    part = tuple(
      (
        a + (cut := int(rng.integers(0, b - a))),
        int(rng.integers(a + cut, b)) + 1,
      )
      for a, b in whole
    )
    data = rng.integers(0, 99, 4000).astype(np.int16)
    piece = pieces.Piece('x', whole, 64)
    array = pieces.view(data.view(np.uint8), piece, np.dtype(np.int16))
    wanted = array[pieces.within(part, whole)]
    first, last = pieces.byte_range(piece, part, 2)
    assert data[first // 2] == wanted.ravel()[0]
    assert data[last // 2 - 1] == wanted.ravel()[-1]
    assert pieces.intersect(part, whole) == part


def test_processes_must_divide_keepers():
  assert pieces.owners(4, 2) == [0, 0, 1, 1]
  with pytest.raises(ValueError, match='4 keepers for 3 processes'):
    pieces.owners(4, 3)
