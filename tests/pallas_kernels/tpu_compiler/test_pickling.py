"""Functions of every make arrive in another process."""

import functools
import pickle
import subprocess
import sys

import jax
from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention
import jax.numpy as jnp
import pytest

from pallas_kernels.tpu_compiler import pickling


@jax.custom_vjp
def _cube(x):
  return x**3


# A wrong derivative on purpose, to tell it from the right one.
_cube.defvjp(lambda x: (x**3, x), lambda x, g: (g * x * 7,))


def _local_cube():
  @jax.custom_vjp
  def f(x):
    return x**3

  f.defvjp(lambda x: (x**3, x), lambda x, g: (g * x * 7,))
  return f


_local = _local_cube()


def test_custom_derivatives_arrive(tmp_path):
  functions = [
    lambda x: jax.grad(_cube)(x),
    lambda x: jax.grad(_local)(x),
    jax.grad(jax.jit(_local)),
    functools.partial(lambda f, x: jax.grad(f)(x), _local),
  ]
  path = tmp_path / 'f.pkl'
  path.write_bytes(pickling.dumps(functions))
  code = (
    'import pickle, sys; sys.path.extend(sys.argv[2].split("|")); '
    'print([float(f(2.0)) for f in pickle.load(open(sys.argv[1], "rb"))])'
  )
  done = subprocess.run(
    [sys.executable, '-c', code, str(path), '|'.join(sys.path)],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.stdout.strip() == '[14.0, 14.0, 14.0, 14.0]', done.stderr


def test_wrappers_that_a_module_names_go_by_name():
  def f(q):
    return flash_attention(q, q, q)

  data = pickling.dumps(f)
  assert len(data) < 2000
  q = jax.ShapeDtypeStruct((1, 1, 128, 128), jnp.float32)
  assert jax.eval_shape(pickle.loads(data), q) == q


def test_devices_cannot_be_sent():
  mesh = jax.make_mesh((2,), ('a',))
  with pytest.raises(ValueError, match='compile_built'):
    pickling.dumps(lambda x: (mesh, x))
