"""Each layout reads what another saved; the full matrix is a benchmark."""

import json
import pathlib

import jax
import pytest

from experiments.benchmarks import checkpoint_layouts_runs as runs

_RESULTS = pathlib.Path(runs.__file__).parent / 'results'
_NAMES = list(runs.LAYOUTS)


_SOME = (
  '',
  'tensor=8',
  'data=2,expert=4',
  'fsdp=2,context=2,tensor=2',
  'stage=2,context=2',
)


@pytest.mark.parametrize(
  'names', [_SOME, pytest.param(tuple(_NAMES), marks=pytest.mark.slow)]
)
def test_a_state_goes_round_all_layouts(tmp_path, names):
  """Each saves what it has read of the one before, as both readers read it."""
  layouts = [runs.Layout(name, tmp_path) for name in names]
  layouts[0].save(layouts[0].random_state())
  split = {
    n for n, layout in zip(names, layouts, strict=True) if _splits(layout)
  }
  assert set(names) - split <= {'', 'data=8', 'context=8'}
  for source, target in zip(layouts, layouts[1:] + layouts[:1], strict=True):
    whole, by_rectangle = target.restored(source.folder)
    assert runs.is_same(whole, source, target), (source.name, target.name)
    assert runs.is_same(by_rectangle, source, target)
    if target is not layouts[0]:
      target.save(runs.TrainState(**by_rectangle))
  assert runs.is_same(whole, layouts[0], layouts[0])


def _splits(layout):
  """Whether it splits parameters at all."""
  shardings = jax.tree.leaves(layout.spec.shardings.params)
  return not all(s.is_fully_replicated for s in shardings)


@pytest.mark.slow
def test_training_goes_on_with_the_same_losses(tmp_path):
  names = ('fsdp=8', 'stage=2,expert=2,tensor=2', 'fsdp=2,tensor=2')
  made = [runs.Layout(name, tmp_path) for name in names]
  for layout in made:
    layout.train()
  for source in made:
    for target in made:
      record = runs.pair(source, target)
      assert record['same_bits']
      assert record['difference'] <= runs.TOLERANCE


def test_the_full_matrix_has_been_run():
  result = json.loads((_RESULTS / 'checkpoint_layouts.json').read_text())
  pairs = {(r['source'], r['target']) for r in result['records']}
  assert pairs == {(a, b) for a in _NAMES for b in _NAMES}
  assert all(r['same_bits'] for r in result['records'])
  worst = max(r['difference'] for r in result['records'])
  assert 0 < worst <= runs.TOLERANCE
