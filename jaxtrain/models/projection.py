"""Matrix product of activations and a weight, with a backward for CPUs too."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.common.varying import vary_alike


def project(x: jax.Array, kernel: jax.Array, num_in: int = 1) -> jax.Array:
  """`x [..., *in] @ kernel [*in, *out]` -> `[..., *out]`.

  XLA transposes the first operand of the weight gradient. JAX puts the
  cotangent there, whatever its size, and XLA on a CPU then computes the
  cotangent's elements one by one as it transposes them. Here the smaller of the
  two operands comes first. Differentiable in reverse mode, any number of times.

  Args:
    x: Activations.
    kernel: Weight, of the dtype of `x`.
    num_in: Number of dimensions to contract.
  """
  return _project(num_in, *vary_alike(x, kernel))


def _forward(num_in, x, kernel):
  return _dot(x, kernel, range(x.ndim - num_in, x.ndim), range(num_in))


_project = jax.custom_vjp(_forward, nondiff_argnums=(0,))


def _fwd(num_in, x, kernel):
  # Not `_project`: remat policies look for the product itself.
  return _forward(num_in, x, kernel), (x, kernel)


def _bwd(num_in, residuals, d_y):
  x, kernel = residuals
  num_out = kernel.ndim - num_in
  batch = range(x.ndim - num_in)
  d_x = _dot(
    d_y, kernel, range(len(batch), d_y.ndim), range(num_in, kernel.ndim)
  )
  if math.prod(kernel.shape[:num_in]) <= math.prod(kernel.shape[num_in:]):
    return d_x, _dot(x, d_y, batch, batch)
  transposed = _dot(d_y, x, batch, batch)
  return d_x, jnp.moveaxis(
    transposed, range(num_out), range(num_in, kernel.ndim)
  )


_project.defvjp(_fwd, _bwd)


def _dot(a, b, a_dims, b_dims):
  return jax.lax.dot_general(a, b, ((tuple(a_dims), tuple(b_dims)), ((), ())))
