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
  # What is known before the compiler refuses is worth having too.
  result = {}
  try:
    _run(job, payload, out, result)
  except Exception as e:
    result['error'] = f'{type(e).__name__}: {e}'
    result['traceback'] = traceback.format_exc()
  (out / 'result.json').write_text(json.dumps(result, indent=1))


def _run(job, payload, out, result):
  """Fills in `result`."""
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
  values = build.values(args) if hasattr(build, 'values') else []
  operands = _operands(traced.jaxpr, values)
  lowered = traced.lower()
  key = _key(job, lowered, operands)
  if (pathlib.Path(job['cache_dir']) / key / 'result.json').exists():
    result['key'] = key
    return
  lowered_at = time.perf_counter()
  result.update(
    key=key,
    device_kind=devices[0].device_kind,
    num_devices=len(devices),
    mesh_axes=dict(getattr(build, 'mesh_axes', None) or _mesh_axes(args)),
    coords=_coords(build, args, devices),
    arguments=_argument_bytes(args, None),
    whole_arguments=_whole_bytes(args),
    lower_s=lowered_at - started,
    jax=jax.__version__,
    libtpu=job['libtpu'],
  )
  compiled = lowered.compile()
  compiled_at = time.perf_counter()
  (out / 'hlo.txt').write_text(compiled.as_text())
  (out / 'operands.pkl').write_bytes(pickle.dumps(operands))
  result.update(
    arguments=_argument_bytes(args, compiled),
    compile_s=compiled_at - lowered_at,
    memory=_memory(compiled.memory_analysis()),
  )


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


def _coords(build, args, devices):
  """Coordinates of the chips of the mesh's devices, in its order."""
  import jax

  from pallas_kernels.tpu_compiler import call

  for leaf in jax.tree.leaves(args):
    mesh = getattr(getattr(leaf, 'sharding', None), 'mesh', None)
    if mesh is not None:
      devices = mesh.devices.flat
      break
  else:
    if getattr(build, 'mesh_axes', None):
      devices = call.make_mesh(build.mesh_axes, devices).devices.flat
  return [list(d.coords) for d in devices]


def _argument_bytes(args, compiled):
  """Bytes per device of each argument, by its path.

  Before there is a compiled program only given shardings count.
  """
  import jax

  arrays = _arrays(args)
  chosen = jax.tree.leaves(compiled.input_shardings[0]) if compiled else []
  if len(chosen) != len(arrays):  # Some are not used, nor known here.
    chosen = [None] * len(arrays)
  found = {}
  for (path, leaf), otherwise in zip(arrays, chosen, strict=True):
    sharding = leaf.sharding or otherwise
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    found[path] = math.prod(shape) * leaf.dtype.itemsize
  return found


def _whole_bytes(args):
  """Bytes of each argument over all devices, every element once."""
  return {
    path: math.prod(leaf.shape) * leaf.dtype.itemsize
    for path, leaf in _arrays(args)
  }


def _arrays(args):
  import jax

  leaves = jax.tree_util.tree_leaves_with_path(args)
  return [
    (jax.tree_util.keystr(path), leaf)
    for path, leaf in leaves
    if hasattr(leaf, 'shape')
  ]


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
