"""The process that compiles: `python -m ...worker JOB FOLDER`.

libtpu reads its flags once, when it is loaded, and it may abort; both are why
this is a process of its own. What it finds is written to FOLDER.
"""

import hashlib
import importlib
import json
import math
import os
import pathlib
import pickle
import sys
import time
import traceback


def main(job_path: str, folder: str) -> None:
  """Runs one job; `result.json` says how it went."""
  out = pathlib.Path(folder)
  with open(job_path, 'rb') as f:
    job = pickle.load(f)
    sys.path.extend(p for p in job['sys_path'] if p not in sys.path)
    # The functions come second: unpickling them may import jax.
    payload = f.read()
  try:
    result = _run(job, payload, out)
  except Exception as e:
    result = {
      'error': f'{type(e).__name__}: {e}',
      'traceback': traceback.format_exc(),
    }
  (out / 'result.json').write_text(json.dumps(result, indent=1))


def _run(job, payload, out):
  import jax
  from jax.experimental import topologies

  for name, value in job['jax_config'].items():
    jax.config.update(name, value)
  description = topologies.get_topology_desc(
    platform='tpu', topology_name=job['topology'], **job['topology_options']
  )
  devices = description.devices[: job['num_devices']]
  _show_target(devices)
  build = pickle.loads(payload)
  fn, args = build(devices)
  started = time.perf_counter()
  traced = fn.trace(*args)
  values = build.values() if hasattr(build, 'values') else []
  operands = _operands(traced.jaxpr, values)
  lowered = traced.lower()
  key = _key(job, lowered, operands)
  if (pathlib.Path(job['cache_dir']) / key / 'result.json').exists():
    return {'key': key}
  lowered_at = time.perf_counter()
  compiled = lowered.compile()
  compiled_at = time.perf_counter()
  (out / 'hlo.txt').write_text(compiled.as_text())
  (out / 'operands.pkl').write_bytes(pickle.dumps(operands))
  return {
    'key': key,
    'device_kind': devices[0].device_kind,
    'num_devices': len(devices),
    'arguments': _argument_bytes(args, compiled),
    'mesh_axes': dict(getattr(build, 'mesh_axes', None) or _mesh_axes(args)),
    'lower_s': lowered_at - started,
    'compile_s': compiled_at - lowered_at,
    'cost': _cost(compiled),
    'memory': _memory(compiled.memory_analysis()),
    'jax': jax.__version__,
    'libtpu': job['libtpu'],
  }


def _show_target(devices):
  """Lets kernels that choose block sizes by the device see the target.

  They ask at trace time, each in its own way; all answers are CPU here.
  """
  import jax
  import jax.extend.backend

  first = devices[0]
  real_devices = jax.devices

  def jax_devices(*args, **kwargs):
    return real_devices(*args, **kwargs) if args or kwargs else list(devices)

  answers = [
    (_tpu_info(), 'get_device_kind', lambda: first.device_kind),
    (_tpu_info(), 'get_num_device_cores', lambda: first.num_cores),
    (jax.extend.backend, 'get_default_device', lambda: first),
    (jax, 'devices', jax_devices),
    (jax, 'default_backend', lambda: 'tpu'),
  ]
  for module, name, answer in answers:
    if not hasattr(module, name):
      raise AttributeError(f'{module.__name__} has no {name} to replace')
    setattr(module, name, answer)


def _tpu_info():
  try:
    return importlib.import_module('jax._src.tpu_info')
  except ModuleNotFoundError:  # jax < 0.11.
    return importlib.import_module('jax._src.pallas.mosaic.tpu_info')


def _operands(jaxpr, values):
  from pallas_kernels.tpu_compiler import operands

  leaves = len(jaxpr.jaxpr.invars)
  return operands.pallas_operands(jaxpr, values or [None] * leaves)


def _key(job, lowered, operands):
  """Name of the result: of the program, the known values, the compiler."""
  digest = hashlib.sha256()
  digest.update(lowered.as_text().encode())
  digest.update(pickle.dumps(operands))
  for name in ('topology', 'num_devices', 'flags', 'libtpu', 'jax', 'format'):
    digest.update(f'{name}={job[name]};'.encode())
  return digest.hexdigest()[:32]


def _mesh_axes(args):
  """Axes of the mesh that the arguments are on."""
  import jax

  for leaf in jax.tree.leaves(args):
    mesh = getattr(getattr(leaf, 'sharding', None), 'mesh', None)
    if mesh is not None:
      return dict(mesh.shape)
  return {}


def _argument_bytes(args, compiled):
  """Bytes per device of each argument, by its path."""
  import jax

  leaves = jax.tree_util.tree_leaves_with_path(args)
  arrays = [(path, leaf) for path, leaf in leaves if hasattr(leaf, 'shape')]
  chosen = jax.tree.leaves(compiled.input_shardings[0])
  if len(chosen) != len(arrays):  # Some are not used, nor known here.
    chosen = [None] * len(arrays)
  found = {}
  for (path, leaf), otherwise in zip(arrays, chosen, strict=True):
    sharding = leaf.sharding or otherwise
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    size = math.prod(shape) * leaf.dtype.itemsize
    found[jax.tree_util.keystr(path)] = size
  return found


def _cost(compiled):
  cost = compiled.cost_analysis() or {}
  cost = cost[0] if isinstance(cost, list) else cost
  return {name: float(value) for name, value in cost.items()}


def _memory(analysis):
  return {
    name: int(getattr(analysis, name))
    for name in dir(analysis)
    if name.endswith('_in_bytes')
  }


if __name__ == '__main__':
  main(*sys.argv[1:])
  # libtpu's own threads would abort an orderly exit.
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(0)
