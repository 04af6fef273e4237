"""The search: what is compiled, kept, skipped, and drawn as the front."""

import dataclasses
import importlib.util
import json

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import pytest

from pallas_kernels.tpu_compiler import memory
from pallas_kernels.tpu_compiler import plan as plan_lib
from pallas_kernels.tpu_compiler.compile import CompileError
from pallas_kernels.tpu_compiler.compile import OutOfMemoryError
from pallas_kernels.tpu_compiler.plan import Budget
from pallas_kernels.tpu_compiler.plan import Point

_GIB = memory.GIB


@dataclasses.dataclass
class _Cost:
  step_ms: float
  exposed_collective_ms: float = 1.0
  flops: float = 2.0
  unknown: tuple = ()


@dataclasses.dataclass
class _Compiled:
  gib: float
  cost: _Cost
  mesh_size: int = 4
  compile_s: float = 3.0

  @property
  def memory(self):
    return memory.Memory(0, 0, 0, 0, 0, int(self.gib * _GIB))

  def memory_by_class(self, classes):
    return {'temporaries': self.memory.peak}

  def advice(self, limit, classes):
    return f'too large for {limit:g}'


@pytest.fixture
def compiled(monkeypatch):
  """Replaces the compiler: layout -> result or error; lists what it did."""
  done = []

  def compile_built(build, *, topology, **_):
    done.append((topology, build))
    result = compile_built.results(**build)
    if isinstance(result, Exception):
      raise result
    return result

  monkeypatch.setattr(plan_lib, 'compile_built', compile_built)
  monkeypatch.setattr(plan_lib, 'versions', lambda: {'jax': '1'})
  compile_built.done = done
  return compile_built


def _too_large(gib):
  result = dict(
    arguments={'[0]': 0}, whole_arguments={'[0]': 0}, mesh_axes={'x': 4}
  )
  message = 'temporaries (20.00G) exceeds available HBM (15.75G)'
  return OutOfMemoryError(message, result, int(gib * _GIB))


_LAYOUTS = plan_lib.layouts({'mesh': ['a', 'b'], 'remat': ['full', 'none']})


def _result(mesh, remat):
  if remat == 'none':
    return _too_large(20)
  return _Compiled(8.0 if mesh == 'a' else 10.0, _Cost(5.0))


def test_layouts_are_all_combinations():
  assert _LAYOUTS[1] == {'mesh': 'a', 'remat': 'none'}
  assert len(_LAYOUTS) == 4


def test_results_in_order_with_what_they_take(compiled):
  compiled.results = _result
  seen = []
  points = plan_lib.plan(
    dict,
    ['v5e:2x2'],
    layouts=_LAYOUTS,
    work=lambda layout: 10.0,
    on_point=seen.append,
  )
  assert [p.layout for p in points] == _LAYOUTS
  assert [p.status for p in points] == ['fits', 'too large'] * 2
  assert points == seen
  assert points[0].gib == 8
  assert points[0].device_ms_per_work == 5.0 * 4 / 10
  assert 'micro-batches' in points[1].message
  # As fast and smaller: the second one that fits is not on the front.
  assert plan_lib.pareto(points) == [points[0]]
  text = plan_lib.table(points)
  assert '* v5e:2x2 mesh=a remat=full\n' in text
  assert text.endswith('too large')


def test_an_interrupted_search_goes_on(compiled, tmp_path, monkeypatch):
  path = tmp_path / 'plan.jsonl'
  search = lambda *budget: plan_lib.plan(
    dict, ['v5e:2x2'], Budget(*budget), layouts=_LAYOUTS, path=path
  )

  def interrupted(mesh, remat):
    if mesh == 'b':
      raise KeyboardInterrupt
    return _result(mesh, remat)

  compiled.results = interrupted
  with pytest.raises(KeyboardInterrupt):
    search()
  assert len(path.read_text().splitlines()) == 2
  with path.open('a') as f:
    f.write('{"topology": "v5e:2x2", "lay')  # Killed while writing.
  compiled.results = _result
  compiled.done.clear()
  assert [p.status for p in search(1)] == ['fits', 'too large', 'fits']
  assert len(compiled.done) == 1
  with path.open('a') as f:
    f.write('\n')
  assert len(search()) == 4
  # Results of another compiler do not count.
  monkeypatch.setattr(plan_lib, 'versions', lambda: {'jax': '2'})
  compiled.done.clear()
  search()
  assert len(compiled.done) == 4


def test_failures_are_tried_again(compiled, tmp_path):
  compiled.results = lambda **_: CompileError('no such layout')
  search = lambda: plan_lib.plan(
    dict,
    ['v5e:2x2'],
    layouts=_LAYOUTS[:1],
    path=tmp_path / 'plan.jsonl',
  )
  (point,) = search()
  assert (point.status, point.message) == ('failed', 'no such layout')
  search()
  assert len(compiled.done) == 2


def test_what_cannot_fit_is_not_compiled(compiled):
  rising = {'remat': ['full', 'some', 'none']}
  tried = plan_lib.layouts({'mesh': ['a'], 'remat': ['full', 'some', 'none']})
  tried.append({'mesh': 'large', 'remat': 'full'})

  def results(mesh, remat):
    return _too_large(20) if remat != 'full' else _result(mesh, remat)

  compiled.results = results
  points = plan_lib.plan(
    dict,
    ['v5e:2x2'],
    layouts=tried,
    rising=rising,
    at_least=lambda topology, layout: (
      17.0 * _GIB if layout['mesh'] == 'large' else 0.0
    ),
  )
  assert [p.status for p in points] == [
    'fits',
    'too large',
    'skipped',
    'skipped',
  ]
  assert 'which does not fit' in points[2].message
  assert points[3].message == 'at least 17.00 GiB a device'
  assert len(compiled.done) == 2


def test_a_budget_of_memory_is_the_limit(compiled):
  compiled.results = _result
  points = plan_lib.plan(
    dict, ['v5e:2x2'], Budget(hbm_gib=9.0), layouts=_LAYOUTS[::2]
  )
  assert [p.status for p in points] == ['fits', 'too large']
  assert points[1].message == 'too large for 9'
  none = plan_lib.plan(
    dict, ['v5e:2x2'], Budget(seconds=-1.0), layouts=_LAYOUTS
  )
  assert none == []


def test_saved_with_its_front(tmp_path):
  points = [
    Point('v5e', {'a': k}, 'fits', 1, {'x': gib * _GIB}, step_ms=ms)
    for k, (gib, ms) in enumerate([(4, 9.0), (8, 5.0), (9, 6.0), (2, 9.5)])
  ]
  assert [p.layout['a'] for p in plan_lib.pareto(points)] == [1, 0, 3]
  plan_lib.save(points, tmp_path / 'plan.json', model='m')
  saved = json.loads((tmp_path / 'plan.json').read_text())
  assert saved['model'] == 'm'
  assert [row['pareto'] for row in saved['points']] == [True, True, False, True]


def test_refuses():
  with pytest.raises(ValueError, match='at_most=0'):
    plan_lib.plan(dict, [], layouts=[], at_most=0)
  with pytest.raises(ValueError, match='unknown chip'):
    plan_lib.plan(dict, ['h100'], layouts=[])


@dataclasses.dataclass(frozen=True)
class _Product:
  """A kernel's block size is a layout like any other."""

  block: int

  def __call__(self, devices):
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=sharding)

    def kernel(x_ref, y_ref, o_ref):
      o_ref[...] = jnp.dot(x_ref[...], y_ref[...])

    def product(x, y):
      spec = pl.BlockSpec((self.block, 1024), lambda i: (i, 0))
      return pl.pallas_call(
        kernel,
        grid=(1024 // self.block,),
        in_specs=[spec, pl.BlockSpec((1024, 1024), lambda i: (0, 0))],
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        name='product',
      )(x, y)

    return jax.jit(product), (x, x)


@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason="needs the TPU compiler: pip install 'onemesh[tpu]'",
)
def test_block_sizes_of_a_kernel(tmp_path):
  points = plan_lib.plan(
    lambda layout: _Product(**layout),
    ['v5e'],
    layouts=plan_lib.layouts({'block': [8, 256]}),
    cache_dir=tmp_path,
  )
  small, large = points
  assert small.unknown == large.unknown == ()
  assert large.step_ms < 0.5 * small.step_ms
  assert plan_lib.pareto(points)[0] is large
