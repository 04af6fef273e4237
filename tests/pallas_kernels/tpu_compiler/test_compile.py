"""What the real TPU compiler says of small programs, without a TPU.

Each compile is a process of its own, a second or two.
"""

import functools
import importlib.util
import os
import pickle
import signal

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import flash_attention as upstream
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from pallas_kernels import tpu_compiler

_S = jax.ShapeDtypeStruct
_needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason="needs the TPU compiler: pip install 'onemesh[tpu]'",
)


@pytest.fixture(scope='module')
def compile_for(tmp_path_factory):
  """`compile_for` with a cache of these tests' own."""
  return functools.partial(
    tpu_compiler.compile_for,
    cache_dir=tmp_path_factory.mktemp('tpu_compiler'),
    timeout_s=300.0,
  )


def _bf16(*shape):
  return _S(shape, jnp.bfloat16)


def _matmul(x, y, *, block=None):
  """x [M,K] times y [K,N] in float32; whole, or in blocks of `block`^3."""
  m, k, n = *x.shape, y.shape[1]
  bm, bk, bn = (m, k, n) if block is None else (block,) * 3

  def kernel(x_ref, y_ref, o_ref, total_ref):
    @pl.when(pl.program_id(2) == 0)
    def _():
      total_ref[...] = jnp.zeros_like(total_ref)

    total_ref[...] += jnp.dot(
      x_ref[...], y_ref[...], preferred_element_type=jnp.float32
    )

    @pl.when(pl.program_id(2) == k // bk - 1)
    def _():
      o_ref[...] = total_ref[...].astype(o_ref.dtype)

  return pl.pallas_call(
    kernel,
    grid=(m // bm, n // bn, k // bk),
    in_specs=[
      pl.BlockSpec((bm, bk), lambda i, j, l: (i, l)),
      pl.BlockSpec((bk, bn), lambda i, j, l: (l, j)),
    ],
    out_specs=pl.BlockSpec((bm, bn), lambda i, j, l: (i, j)),
    out_shape=_S((m, n), x.dtype),
    scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary')
    ),
    name='matmul',
  )(x, y)


def _dot(x, y):
  def kernel(x_ref, y_ref, o_ref):
    o_ref[...] = jnp.dot(
      x_ref[...], y_ref[...], preferred_element_type=jnp.float32
    )

  shape = _S((x.shape[0], y.shape[1]), jnp.float32)
  return pl.pallas_call(kernel, out_shape=shape, name='dot')(x, y)


@_needs_libtpu
def test_memory_is_the_arrays_and_what_is_donated(compile_for):
  def update(params, grads):
    return params - 0.1 * grads

  x = _S((1024, 2048), jnp.float32)
  size = 1024 * 2048 * 4
  compiled = compile_for(update, x, x, topology='v5e', donate_argnums=0)
  memory = compiled.memory
  assert (memory.arguments, memory.outputs, memory.aliased) == (
    2 * size,
    size,
    size,
  )
  assert memory.peak == 2 * size
  assert memory.fits(16.0)
  assert not memory.fits(2 * size / 2**30)
  compiled.check()
  with pytest.raises(ValueError, match=r'0.02 GiB.*exceed 0.01 GiB:\n  other'):
    compiled.check(hbm_gib=0.01)
  # It reads two arrays, writes one, and multiplies no matrices.
  assert compiled.cost.bytes_accessed == 3 * size
  assert compiled.cost.flops == 0
  assert compiled.kernels == ()


@_needs_libtpu
def test_sharding_divides_memory_and_adds_collectives(compile_for):
  x, w = _bf16(1024, 512), _bf16(512, 2048)
  compiled = compile_for(
    lambda x, w: x @ w,
    x,
    w,
    topology='v5e:2x2',
    mesh_axes={'data': 2, 'tensor': 2},
    in_shardings=(P('data', None), P('tensor', None)),
    out_shardings=P('data', None),
  )
  assert (compiled.num_devices, compiled.mesh_axes) == (
    4,
    {'data': 2, 'tensor': 2},
  )
  assert compiled.memory.arguments == (1024 * 512 + 512 * 2048) * 2 // 2
  (collective,) = compiled.collectives
  assert collective.axes == ('tensor',)
  assert collective.groups == ((0, 1), (2, 3))
  assert collective.op in ('all-gather', 'all-reduce')
  bytes_of = {'all-gather': 512 * 2048 * 2, 'all-reduce': 512 * 2048 * 2}
  assert collective.bytes == bytes_of[collective.op]
  compiled.check(exposed_collective_bytes=float(collective.bytes))
  if not collective.asynchronous:
    with pytest.raises(ValueError, match='over tensor: 2,097,152 bytes x 1'):
      compiled.check(exposed_collective_bytes=1e6)


@_needs_libtpu
def test_a_step_by_its_time(compile_for):
  x, w = _bf16(1024, 4096), _bf16(4, 4096, 4096)

  def layers(x, w):
    out, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, w)
    return out

  compiled = compile_for(
    layers,
    x,
    w,
    topology='v5e:2x2',
    mesh_axes={'fsdp': 4},
    in_shardings=(P('fsdp'), P(None, 'fsdp')),
    out_shardings=P('fsdp'),
  )
  cost, needed = compiled.cost, 2 * 4 * 1024 * 4096 * 4096
  assert cost.flops == needed / 4
  # Each device reads its quarter of the weights; the rest comes over the links,
  # into VMEM or HBM.
  assert cost.bytes_accessed >= 4 * 4096 * 4096 * 2 / 4
  assert compiled.mfu(float(needed)) == pytest.approx(
    needed / 4 / (cost.step_ms * 1e-3) / 197e12
  )
  assert cost.step_ms >= needed / 4 / 197e12 * 1e3
  parts = cost.compute_ms + cost.copy_ms + cost.exposed_collective_ms
  assert parts == pytest.approx(cost.step_ms)
  total = sum(c.count * c.milliseconds for c in compiled.collectives)
  assert 0 < cost.exposed_collective_ms <= total
  compiled.check(exposed_collective_ms=total)
  with pytest.raises(
    ValueError, match=r'exposed collectives exceed 0 ms:\n.*fs'
  ):
    compiled.check(exposed_collective_ms=0.0)
  sizes = compiled.memory_by_class({'[0]': 'activations', '[1]': 'parameters'})
  assert sizes['parameters'] == 4 * 4096 * 4096 * 2 // 4
  assert sum(sizes.values()) == compiled.memory.total
  assert 'parameters' in compiled.report({'[1]': 'parameters'})
  assert compiled.whole_arguments['[1]'] == 4 * 4096 * 4096 * 2


@_needs_libtpu
@pytest.mark.parametrize(
  'topology, num_devices',
  [('v4:2x2x2', 8), ('v5p:4x4x4', 64), ('v6e:16x16', 256), ('tpu7x:2x2x1', 8)],
)
def test_slices_and_pods(compile_for, topology, num_devices):
  compiled = compile_for(
    lambda x: jnp.sum(x, 0),
    _S((4096, 128), jnp.float32),
    topology=topology,
    in_shardings=P('device'),
  )
  assert compiled.num_devices == num_devices
  assert compiled.memory.arguments == 4096 * 128 * 4 // num_devices
  assert {c.axes for c in compiled.collectives} == {('device',)}


@_needs_libtpu
def test_result_is_cached_and_plain(compile_for):
  compile_it = lambda size: compile_for(
    lambda x: x * 2, _bf16(size, 128), topology='v5e'
  )
  first = compile_it(8)
  assert compile_it(8) == first
  assert compile_it(16).folder != first.folder
  assert pickle.loads(pickle.dumps(first)) == first
  assert 'ENTRY' in first.hlo_text.read_text()
  left = {p.name.split('-')[0] for p in first.folder.parent.iterdir()}
  assert 'job' not in left


@_needs_libtpu
def test_tracing_sees_the_target(compile_for):
  def f(x):
    info = pltpu.get_tpu_info()
    assert jax.devices()[0].device_kind == 'TPU v6 lite'
    return x * (1 + info.mxu_column_size)

  compiled = compile_for(f, _S((8, 128), jnp.float32), topology='v6e')
  assert compiled.device_kind == 'TPU v6 lite'
  assert 'constant(257)' in compiled.hlo_text.read_text()


@_needs_libtpu
def test_programs_are_lowered_for_the_tpu(compile_for):
  def f(x):
    return jax.lax.platform_dependent(
      x, tpu=lambda x: x + 1234, default=lambda x: x + 4321
    )

  compiled = compile_for(f, _S((8, 128), jnp.float32), topology='v5e')
  text = compiled.hlo_text.read_text()
  assert 'constant(1234)' in text
  assert 'constant(4321)' not in text


@_needs_libtpu
def test_cycles_of_a_tpu_v4(compile_for):
  """A v4's cycle counter: +224 from 128 to 1024 rows, +259 from 16.

  Measured by https://ayaka14732.github.io (Pallas TPU tutorial): bfloat16
  [M,128] x [128,128] in VMEM. Stalls are the copies, outside the measurement.
  """
  busy = {}
  for rows in (16, 128, 1024):
    compiled = compile_for(
      _dot, _bf16(rows, 128), _bf16(128, 128), topology='v4'
    )
    schedule = compiled.schedule()
    busy[rows] = schedule.cycles - schedule.stall_cycles
    # One vmatmul takes 16 rows on one of four MXUs.
    assert schedule.matmuls == {'vmatmul.bf16': rows // 16}
    assert schedule.bytes_read == (rows + 128) * 128 * 2
    assert schedule.bytes_written == rows * 128 * 4
  assert busy[1024] - busy[128] == 224
  assert abs(busy[1024] - busy[16] - 259) <= 1


@_needs_libtpu
def test_time_of_a_matmul_on_v5e(compile_for):
  """192 us: 1024^3 in blocks of 128^3, of which copies bound the time.

  Measured by https://docs.jax.dev/en/latest/pallas/tpu/matmul.html; this model
  of copies is fitted to another size there and comes out 4 % short here.
  """
  x = _bf16(1024, 1024)
  compiled = compile_for(_matmul, x, x, block=128, topology='v5e')
  assert compiled.kernels == ('matmul.1',)
  schedule = compiled.schedule('matmul')
  assert schedule.microseconds == pytest.approx(192, rel=0.06)
  assert schedule.stall_cycles > 0.2 * schedule.cycles
  # Each block of x and y is read for each of the eight blocks across.
  assert schedule.bytes_read == 2 * 8 * 1024 * 1024 * 2
  assert schedule.bytes_written == 1024 * 1024 * 2


# Cycles of upstream's flash attention by the prototype of this package, with
# libtpu 0.0.51: bfloat16, B=1, H=2, D=128, S=1024, causal, blocks of 512.
_FLASH_CYCLES = {'v5e': 14196, 'v5p': 8389, 'v6e': 11071, 'tpu7x': 11303}


@_needs_libtpu
@pytest.mark.parametrize('topology', tpu_compiler.CHIPS)
def test_flash_attention(compile_for, topology):
  blocks = upstream.BlockSizes(
    block_q=512, block_k_major=512, block_k=512, block_b=1
  )
  x = _bf16(1, 2, 1024, 128)
  compiled = compile_for(
    lambda q, k, v: upstream.flash_attention(
      q, k, v, causal=True, block_sizes=blocks
    ),
    x,
    x,
    x,
    topology=topology,
  )
  schedule = compiled.schedule()
  if topology in _FLASH_CYCLES:
    assert schedule.cycles == pytest.approx(_FLASH_CYCLES[topology], rel=0.02)
  # Three of four tiles for each head: 512 / 16 rows; q k has four or two
  # columns of 128 or 256, and p v as many parts to add up.
  size = tpu_compiler.CHIPS[topology].mxu_size
  products = sum(schedule.matmuls.values()) * schedule.cores
  assert products == 2 * 3 * 2 * (512 // 16) * (512 // size)
  # On tpu7x the inputs of so small a call are in VMEM before it starts.
  size = 2 * 1024 * 128 * 2
  assert schedule.bytes == (size if topology == 'tpu7x' else 4 * size)


def _gather_kernel(length_ref, x_ref, o_ref):
  o_ref[...] = jnp.zeros_like(o_ref)

  def add(i, _):
    o_ref[...] += x_ref[pl.ds(i * 8, 8), :]

  jax.lax.fori_loop(0, length_ref[0], add, None)


def _sum_rows(length, x):
  return pl.pallas_call(
    _gather_kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(1,),
      in_specs=[pl.BlockSpec(x.shape, lambda i, _: (0, 0))],
      out_specs=pl.BlockSpec((8, 128), lambda i, _: (0, 0)),
    ),
    out_shape=_S((8, 128), x.dtype),
    name='sum_rows',
  )(length * 2, x)


@_needs_libtpu
def test_loops_follow_scalar_prefetch_data(compile_for):
  x = _S((512, 128), jnp.float32)
  length = lambda n: np.array([n], np.int32)
  compiled = compile_for(_sum_rows, length(8), x, topology='v5e')
  trips = lambda s: max((loop.trips for loop in s.loops), default=0)
  # The kernel gets twice the length, computed outside of it.
  assert trips(compiled.schedule()) == 16
  given = compiled.schedule(operands={0: length(40)})
  assert trips(given) == 40
  unknown = compile_for(_sum_rows, _S((1,), jnp.int32), x, topology='v5e')
  with pytest.raises(tpu_compiler.UnknownValueError, match='operand 0, s32.1.'):
    unknown.schedule()


@_needs_libtpu
def test_which_kernel(compile_for):
  def f(x):
    return _dot(_matmul(x, x, block=128), x)

  compiled = compile_for(f, _bf16(256, 256), topology='v5e')
  assert len(compiled.kernels) == 2
  assert compiled.schedule('dot').kernel.startswith('dot')
  with pytest.raises(ValueError, match='known: .*dot.*matmul|matmul.*dot'):
    compiled.schedule()
  with pytest.raises(ValueError, match="'conv' means none"):
    compiled.schedule('conv')
  with pytest.raises(ValueError, match='schedules=False'):
    compile_for(f, _bf16(256, 256), topology='v5e', schedules=False).schedule()


@_needs_libtpu
def test_the_compilers_errors_are_passed_on(compile_for):
  with pytest.raises(tpu_compiler.OutOfMemoryError, match='Ran out') as caught:
    compile_for(lambda x: x @ x, _bf16(200_000, 200_000), topology='v5e')
  error = caught.value
  assert error.arguments == {'[0]': 200_000**2 * 2}
  assert 2 * 74.0 <= error.memory.total / 2**30 <= 2 * 80.0
  assert error.limit_bytes == 15.75 * 2**30
  sizes = error.by_class({'[0]': 'parameters'})
  assert list(sizes) == ['parameters', 'activations and temporaries']
  assert 'no change is enough' in error.advice({'[0]': 'parameters'})

  def big(x):
    def kernel(x_ref, o_ref, scratch_ref):
      scratch_ref[pl.ds(0, 8), :] = x_ref[...]
      o_ref[...] = scratch_ref[pl.ds(8, 8), :]

    return pl.pallas_call(
      kernel,
      out_shape=x,
      scratch_shapes=[pltpu.VMEM((2**19, 128), jnp.float32)],
    )(x)

  with pytest.raises(tpu_compiler.CompileError, match='(?i)vmem'):
    compile_for(big, _S((8, 128), jnp.float32), topology='v5e')

  def broken(x):
    raise RuntimeError('the function itself')

  with pytest.raises(tpu_compiler.CompileError, match='the function itself'):
    compile_for(broken, _bf16(8, 128), topology='v5e')


@_needs_libtpu
def test_the_callers_jax_settings_are_the_childs(compile_for):
  x = np.zeros((8, 128), np.float64)
  bytes_of = lambda: compile_for(jnp.sin, x, topology='v5e').memory.arguments
  assert bytes_of() == 8 * 128 * 4
  with jax.enable_x64(True):
    assert bytes_of() == 8 * 128 * 8


@_needs_libtpu
def test_random_keys_are_arguments(compile_for):
  draw = lambda key: jax.random.normal(key, (8, 128))
  key = jax.random.key(0)
  for given in (key, jax.eval_shape(lambda: key)):
    compiled = compile_for(draw, given, topology='v5e')
    assert compiled.arguments == {'[0]': 8}


@_needs_libtpu
def test_killed_jobs_are_swept_away(tmp_path):
  old, new = tmp_path / 'job-old', tmp_path / 'job-new'
  for job in (old, new):
    job.mkdir()
  os.utime(old, (0, 0))
  tpu_compiler.compile_for(
    lambda x: x + 1, _bf16(8, 128), topology='v5e', cache_dir=tmp_path
  )
  assert not old.exists()
  assert new.exists()


@_needs_libtpu
def test_timeout(compile_for):
  with pytest.raises(TimeoutError, match='timeout_s=0.05'):
    compile_for(lambda x: x, _bf16(8, 128), topology='v5e', timeout_s=0.05)


def _kill_yourself(x):
  os.kill(os.getpid(), signal.SIGKILL)
  return x


@_needs_libtpu
def test_a_killed_compiler_is_no_refusal(compile_for):
  with pytest.raises(ChildProcessError, match='SIGKILL'):
    compile_for(_kill_yourself, _bf16(8, 128), topology='v5e')


def test_unknown_chip_needs_no_compiler(compile_for):
  with pytest.raises(ValueError, match='known: v4, v5e, v5p, v6e, tpu7x'):
    compile_for(lambda x: x, _bf16(8, 128), topology='h100')


def test_without_libtpu(compile_for, monkeypatch):
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda name, *a: None if name == 'libtpu' else find_spec(name, *a),
  )
  with pytest.raises(ModuleNotFoundError, match=r"'onemesh\[tpu\]'"):
    compile_for(lambda x: x, _bf16(8, 128), topology='v5e')
