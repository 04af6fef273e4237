"""The process that compiles: `python -m ...worker FOLDER`.

The folder holds a program and its target; dumps and a result are left there.
"""

import json
import pathlib
import sys
import time

import jax
from jax import export
from jax.experimental import topologies
from jax.experimental.pallas import mosaic_gpu  # noqa: F401  Finds its runtime.


def main(folder: pathlib.Path) -> None:
  """Compiles, and writes `result.json`."""
  try:
    result = _compile(folder)
  except Exception as e:
    result = {'error': f'{type(e).__name__}: {e}'}
  (folder / 'result.json').write_text(json.dumps(result))


def _compile(folder):
  topology = topologies.get_topology_desc(
    'gpu',
    platform='cuda',
    target_config=(folder / 'target').read_text(),
    topology='1x1x1',
  )
  mesh = jax.sharding.Mesh(topology.devices, ('x',))
  sharding = jax.sharding.NamedSharding(mesh, jax.P())
  program = export.deserialize(bytearray((folder / 'program').read_bytes()))
  args, kwargs = jax.tree.unflatten(
    program.in_tree,
    [
      jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
      for a in program.in_avals
    ],
  )
  start = time.perf_counter()
  compiled = jax.jit(program.call).trace(*args, **kwargs).lower().compile()
  seconds = time.perf_counter() - start
  return {'hlo': compiled.as_text(), 'seconds': seconds}


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]))
