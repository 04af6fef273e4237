"""Every byte of a checkpoint is covered, and damage names the right array."""

import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import tensorstore as ts

from jaxtrain.checkpoints import abstract
from jaxtrain.checkpoints import file_list
from jaxtrain.checkpoints import manager as manager_lib
from jaxtrain.checkpoints import ocdbt_values
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.checkpoints.ocdbt_values import Span

pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)

_NAMES = ('params/a', 'params/b.c', 'opt/a')


@pytest.fixture(scope='module')
def state():
  mesh = jax.make_mesh((4, 2), ('x', 'y'))
  rng = np.random.default_rng(0)

  def noise(shape, *spec):
    value = rng.normal(size=shape).astype(np.float32)
    return jax.device_put(value, NamedSharding(mesh, P(*spec)))

  return {
    'params': {'a': noise((128, 64), 'x', 'y'), 'b.c': noise((96, 64), 'x')},
    'opt': {'a': noise((128, 64)), 'count': jnp.int32(3)},
  }


@pytest.fixture(scope='module')
def saved(tmp_path_factory, state):
  """Steps 1, 2 and 3; copied, not written to, by the tests."""
  folder = tmp_path_factory.mktemp('checkpoints')
  with CheckpointManager(folder) as manager:
    for step in (1, 2, 3):
      manager.save(step, state, metadata={'step': step})
  return folder


def _flip(path, position, bit=0):
  data = bytearray(path.read_bytes())
  data[position] ^= 1 << bit
  path.write_bytes(data)


def _bytes(folder):
  """Every byte of a step that is in its list, as (file, position)."""
  sizes = file_list.read(folder).sizes
  return [(name, i) for name, n in sizes.items() for i in range(n)]


def test_pieces_cover_every_byte_of_every_file_once(saved):
  listed = file_list.read(saved / '00000003')
  sizes, pieces = listed.sizes, listed.pieces
  files = {
    str(p.relative_to(saved / '00000003'))
    for p in (saved / '00000003').glob('*/**/*')
    if p.is_file()
  }
  assert set(sizes) == files
  for name, size in sizes.items():
    spans = sorted(
      (p.span.start, p.span.size) for p in pieces if p.span.file == name
    )
    ends = np.cumsum([n for _, n in spans])
    assert [start for start, _ in spans] == [0, *ends[:-1]]
    assert ends[-1] == size
  arrays = {p.span.array for p in pieces} - {None}
  assert arrays == set(_NAMES)


def _stored(folder, name):
  """An array as tensorstore reads it alone, `None` if it cannot."""
  spec = {
    'driver': 'zarr',
    'kvstore': {
      'driver': 'ocdbt',
      'base': f'file://{folder}/state/',
      'path': name.replace('/', '.') + '/',
    },
  }
  try:
    return ts.open(spec, open=True).result().read().result()
  except Exception:
    return None


@pytest.mark.parametrize('seed', range(6))
def test_a_flipped_bit_is_attributed_to_the_array_that_it_changes(
  saved, state, tmp_path, seed
):
  """Truth is what tensorstore reads of each array after the flip."""
  shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
  folder = tmp_path / '00000003'
  rng = np.random.default_rng(seed)
  pieces = file_list.read(folder).pieces
  name = _NAMES[seed % 3]
  span = rng.choice([p.span for p in pieces if p.span.array == name])
  _flip(folder / span.file, span.start + rng.integers(span.size), seed)
  expected = rf'bytes {span.start}:\d+ of {span.file} are not what was written'
  with CheckpointManager(tmp_path) as manager:
    with pytest.raises(manager_lib.DamagedError, match=expected) as error:
      manager.restore(state)
  message = str(error.value)
  assert message.endswith('; use step 2 or 1')
  ((found, rows),) = re.findall(r': (\S+) \[(\d+:\d+)', message)
  assert found == name
  values = {n: np.asarray(abstract.leaves(state)[n]) for n in _NAMES}
  for other, want in values.items():
    got = _stored(folder, other)
    if other != name:
      np.testing.assert_array_equal(got, want)
    elif got is not None:
      first, last = map(int, rows.split(':'))
      changed = np.flatnonzero((got != want).any(axis=1))
      assert all(first <= row < last for row in changed)


def test_any_flipped_bit_is_found(saved, state, tmp_path):
  shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
  folder = tmp_path / '00000003'
  everywhere = _bytes(folder)
  rng = np.random.default_rng(0)
  pieces = file_list.read(folder).pieces
  for i in rng.choice(len(everywhere), 40, replace=False):
    name, position = everywhere[i]
    _flip(folder / name, position, i % 8)
    (fault,) = file_list.damage(folder, pieces, {})
    assert name in fault
    _flip(folder / name, position, i % 8)
  assert not file_list.damage(folder, pieces, {})


def test_any_flipped_bit_of_the_list_is_found(saved, tmp_path):
  text = (saved / '00000003' / file_list.NAME).read_bytes()
  rng = np.random.default_rng(0)
  path = tmp_path / file_list.NAME
  for i, position in enumerate(rng.choice(len(text), 200, replace=False)):
    path.write_bytes(text)
    _flip(path, position, i % 8)
    with pytest.raises(ValueError, match='files.json is unreadable'):
      file_list.read(tmp_path)


@pytest.mark.parametrize('name', ['_CHECKPOINT_METADATA', 'commit_success.txt'])
def test_the_files_that_are_not_listed_do_not_matter(
  saved, state, tmp_path, name
):
  """Flipped, emptied or deleted: what is restored is right, if it is."""
  shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
  path = tmp_path / '00000003' / name
  text = path.read_bytes()
  rng = np.random.default_rng(0)
  positions = rng.choice(len(text), 20, replace=False)
  for position in [*positions, None, 'deleted']:
    path.write_bytes(text if position is not None else b'')
    if position == 'deleted':
      path.unlink()
    elif position is not None:
      _flip(path, position, position % 8)
    with CheckpointManager(tmp_path) as manager:
      assert manager.all_steps() == [1, 2, 3]
      restored, _, metadata = manager.restore(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert metadata == {'step': 3}


@pytest.mark.parametrize('end', [0, -1])
def test_what_a_file_held_is_named(saved, state, tmp_path, end):
  shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
  folder = tmp_path / '00000003'
  pieces = file_list.read(folder).pieces
  ours = [p.span for p in pieces if p.span.array == 'opt/a']
  span = max(ours, key=lambda s: (s.file, s.start))
  path = folder / span.file
  data = path.read_bytes()
  last = span.start + span.size + end
  path.write_bytes(data[:last])
  with CheckpointManager(tmp_path) as manager:
    with pytest.raises(manager_lib.DamagedError) as error:
      manager.restore(state)
    names = re.findall(r'(\S+) \[[\d:, ]+\]', str(error.value))
    # What lies before the end is whole.
    assert ('opt/a' in names) == (end < 0)
    path.unlink()
    with pytest.raises(
      manager_lib.DamagedError, match='missing; it held .*opt/a'
    ):
      manager.restore(state)


def test_small_arrays_and_indices_are_named(saved, state, tmp_path):
  shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
  folder = tmp_path / '00000003'
  pieces = file_list.read(folder).pieces
  spans = [p.span for p in pieces if 'which holds' in p.span.what]
  assert spans
  for span in spans:
    _flip(folder / span.file, span.start + span.size // 2)
  with CheckpointManager(tmp_path) as manager:
    with pytest.raises(
      ValueError, match='index of .*, which holds .*opt/count'
    ):
      manager.restore(state)


def test_serving_needs_only_the_parameters_whole(saved, tmp_path):
  shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
  pieces = file_list.read(tmp_path / '00000003').pieces
  span = next(p.span for p in pieces if p.span.array == 'opt/a')
  _flip(tmp_path / '00000003' / span.file, span.start)
  # There is no model in it, which is found after the checksums are right.
  read = lambda: manager_lib.restore_params(tmp_path, None, None)
  with pytest.raises(ValueError, match='without a model config'):
    read()
  span = next(p.span for p in pieces if p.span.array == 'params/a')
  _flip(tmp_path / '00000003' / span.file, span.start)
  with pytest.raises(
    manager_lib.DamagedError, match=r'params/a \[.*use step 2'
  ):
    read()


def test_checksums_need_not_be_compared(saved, state, tmp_path):
  shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
  (tmp_path / '00000003' / 'state' / 'commit_success.txt').write_text('x' * 81)
  with CheckpointManager(tmp_path) as manager:
    with pytest.raises(ValueError, match='commit_success.txt has|is not what'):
      manager.restore(state)
    path = tmp_path / '00000003' / 'state' / 'commit_success.txt'
    sizes = file_list.read(tmp_path / '00000003').sizes
    path.write_text('x' * sizes['state/commit_success.txt'])
    with pytest.raises(ValueError, match='commit_success.txt is not what'):
      manager.restore(state)
    manager.restore(state, verify=False)


@pytest.mark.parametrize('sizes', [True, False])
def test_old_checkpoints_are_read(saved, state, tmp_path, sizes):
  """Before there were checksums the list had sizes; before that was none."""
  shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
  folder = tmp_path / '00000003'
  meta = json.loads((folder / 'meta' / 'metadata').read_text())
  old = {k: meta[k] for k in ('config', 'metadata')}
  (folder / 'meta' / 'metadata').write_text(json.dumps(old))
  found = file_list.read(folder).sizes
  found['meta/metadata'] = len(json.dumps(old))
  (folder / file_list.NAME).write_text(json.dumps(found))
  if not sizes:
    (folder / file_list.NAME).unlink()
  with CheckpointManager(tmp_path) as manager:
    assert manager.verify() == 0
    assert manager.metrics(3) == {}
    restored, _, metadata = manager.restore(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert metadata == {'step': 3}
    if sizes:
      (folder / 'state' / '_sharding').write_text('')
      with pytest.raises(ValueError, match='_sharding has 0 bytes'):
        manager.restore(state)


@pytest.mark.parametrize(
  'content, message',
  [
    (None, 'files.json is missing'),
    ('{"hash": "xxh', 'files.json is unreadable'),
    ('[1, 2]', 'files.json is unreadable'),
    ('{"list": {"hash": "md5"}, "digest": ""}', "hash 'md5' is not 'xxh3_64'"),
  ],
)
def test_a_damaged_list_is_damage(saved, state, tmp_path, content, message):
  shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
  path = tmp_path / '00000003' / file_list.NAME
  path.unlink()
  if content is not None:
    path.write_text(content)
  with CheckpointManager(tmp_path) as manager:
    with pytest.raises(manager_lib.DamagedError, match=message):
      manager.restore(state)


def test_verify_reads_all_bytes_and_reports_them(saved):
  read = []
  with CheckpointManager(saved) as manager:
    total = manager.verify(2, progress=read.append)
  sizes = file_list.read(saved / '00000002').sizes
  assert sum(read) == total == sum(sizes.values())


@pytest.mark.parametrize('count', [1, 2, 3, 7])
def test_shares_are_all_pieces_once_and_about_equal(count):
  rng = np.random.default_rng(count)
  pieces = [
    file_list.Piece(Span(f'f{i}', 0, int(n), None, ''), '')
    for i, n in enumerate(rng.integers(0, 100, 200))
  ]
  shares = [file_list.share(pieces, i, count) for i in range(count)]
  assert sum(shares, []) == pieces
  total = [sum(p.span.size for p in share) for share in shares]
  assert max(total) - min(total) <= 200


def test_trees_of_several_levels_are_walked(tmp_path):
  base = {'driver': 'file', 'path': f'{tmp_path}/'}
  small = {'max_decoded_node_bytes': 400, 'max_inline_value_bytes': 16}
  store = ts.KvStore.open(
    {'driver': 'ocdbt', 'base': base, 'config': small}
  ).result()
  values = {
    f'p.layer.{i:02d}/{c}.0': np.random.default_rng((i, c)).bytes(100)
    for i in range(20)
    for c in range(2)
  }
  with ts.Transaction() as transaction:
    for key, value in values.items():
      store.with_transaction(transaction)[key] = value
  names = {f'p.layer.{i:02d}': f'p/layer/{i:02d}' for i in range(20)}
  spans, grids = ocdbt_values.spans(tmp_path, names)
  spans = [s for s in spans if s.array]
  assert grids == {}
  assert len(spans) == len(values)
  for span in spans:
    stored = (tmp_path / span.file).read_bytes()
    stored = stored[span.start : span.start + span.size]
    assert values[f'{span.array.replace("/", ".")}/{span.what}'] == stored


@pytest.mark.parametrize(
  'array, chunk, grid, expected',
  [
    ('a/b', '1.0', [[10, 3], [6, 3]], 'a/b [6:10, 0:3]'),
    ('a', '0', [[], []], 'a []'),
    ('a', '2', None, 'a (chunk 2)'),
  ],
)
def test_chunks_in_words(array, chunk, grid, expected):
  assert ocdbt_values.describe(array, chunk, grid) == expected


def test_nothing_in_a_folder_that_is_no_database(tmp_path):
  with pytest.raises(ValueError):
    ocdbt_values.spans(pathlib.Path(tmp_path), {})
