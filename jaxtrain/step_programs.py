"""Compiles a training step, of one program or two, for one shape of batch."""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain import train_step as train_step_lib
from jaxtrain.interrupt import with_stop

Compile = Callable[..., Any]


def compile_step(
  step_fn: Any,
  args: tuple[Any, Any, jax.Array],
  mesh: Mesh,
  compile: Compile,
  wait_copied: Callable[[], None],
) -> Callable[..., tuple[Any, Any]]:
  """Makes `(state, batch, flags) -> (state, metrics)`.

  Args:
    step_fn: Of `make_train_step`, or `make_split_step`.
    args: A state, a batch and `StopSignal.flags`.
    mesh: Of the state.
    compile: `(name, function, *args)` to the compiled function.
    wait_copied: Waits until the state may be donated; called between the two
      programs of a split step.
  """
  state, batch, flags = args
  shardings = jax.tree.map(lambda x: x.sharding, state)
  jit = functools.partial(
    jax.jit,
    donate_argnums=0,
    out_shardings=(shardings, NamedSharding(mesh, P())),
  )
  if not isinstance(step_fn, train_step_lib.SplitStep):
    return compile('step', jit(with_stop(step_fn)), *args)
  gradients = compile('gradients', step_fn.gradients, state, batch)
  found = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    jax.eval_shape(step_fn.gradients, state, batch),
    gradients.output_shardings,
  )
  update = compile(
    'update', jit(with_stop(step_fn.update)), state, found, flags
  )

  def advance(state, batch, flags):
    found = gradients(state, batch)
    wait_copied()
    return update(state, found, flags)

  return advance
