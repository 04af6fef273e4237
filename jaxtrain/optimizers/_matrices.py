"""What optimizers of matrices share: which leaves they take, and their keys."""

from typing import Any
import zlib

import jax
import jax.numpy as jnp
import optax

from jaxtrain.optimizers import base


def split(
  matrices: optax.GradientTransformation, rest: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
  """`matrices` for leaves of kind 'matrix', `rest` for all others."""

  def labels(tree):
    return jax.tree.map(
      lambda leaf: 'matrix' if leaf.kind == 'matrix' else 'rest',
      base.describe(tree),
    )

  return optax.partition({'matrix': matrices, 'rest': rest}, labels)


def beside_adamw(
  matrices: optax.GradientTransformation,
  learning_rate: optax.ScalarOrSchedule,
  *,
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  mask: Any,
) -> optax.GradientTransformationExtraArgs:
  """`matrices` with AdamW for the rest, one learning rate and decay for all."""
  return optax.chain(
    split(matrices, optax.scale_by_adam(b1, b2, eps)),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )


def map_matrices(f: Any, tree: Any, *others: Any) -> Any:
  """Tree of `f([..., R, C] in float32, *others)` for a tree of matrices.

  Args:
    f: Takes a leaf's matrices, of all layers and experts at once, and what
      `others` have in the leaf's place.
    tree: Arrays.
    *others: Trees like it, or with subtrees in place of leaves.
  """
  leaves = base.describe(tree)
  return jax.tree.map(
    lambda leaf, x, *o: f(leaf.matrix(x).astype(jnp.float32), *o),
    leaves,
    tree,
    *others,
  )


def shaped_as(tree: Any, like: Any) -> Any:
  """Matrices in the shapes and dtypes of the leaves of `like`."""
  return jax.tree.map(
    lambda x, y: x.reshape(y.shape).astype(y.dtype), tree, like
  )


def unzip(tree: Any, like: Any, num: int) -> list[Any]:
  """Tree of tuples, one for each leaf of `like`, as `num` trees."""
  parts = jax.tree.structure(like).flatten_up_to(tree)
  return [
    jax.tree.structure(like).unflatten([part[i] for part in parts])
    for i in range(num)
  ]


def shaped_key(seed: int, shape: tuple[int, ...]) -> jax.Array:
  """Random key of a matrix.

  It depends on the matrix's own shape and not on its place in the tree, so that
  the layers of a stack have the key each of them would have alone. Matrices of
  one shape share it.
  """
  key = jax.random.key(seed, impl='threefry2x32')
  return jax.random.fold_in(key, zlib.crc32(str(tuple(shape)).encode()))
