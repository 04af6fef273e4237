"""The search of the binary: choices, what it skips, table and picture."""

import json
import subprocess
import sys

import pytest

from experiments import choices
from experiments import layout_search
from jaxtrain.models.config import ModelConfig
from pallas_kernels.tpu_compiler import plan as plan_lib
from pallas_kernels.tpu_compiler.plan import Point

_CHOICES = [
  {'mesh': ['fsdp=4'], 'remat': ['full', 'none']},
  {'mesh': ['data=4'], 'remat': ['full']},
]


@pytest.fixture
def options(tmp_path, monkeypatch):
  model = ModelConfig(
    vocab_size=65536,
    embed_dim=4096,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14336,
    max_seq_len=4096,
  )
  monkeypatch.setattr(choices, 'published', lambda name: model)
  return dict(
    preset='a',
    topologies=['v5p:2x2x1'],
    choices_json=json.dumps(_CHOICES),
    output=str(tmp_path / 'out' / 'plan'),
    batch_size=16,
    seq_len=4096,
    budget=plan_lib.Budget(),
  )


def test_table_and_picture(options, tmp_path, monkeypatch, capsys):
  def plan(fn_of_layout, topologies, budget, *, layouts, at_least, work, **_):
    assert budget.compilations is None
    assert fn_of_layout(layouts[1]).config['remat'] == 'none'
    # All state on each device: 16 bytes less gradients for 4 G parameters.
    assert at_least(topologies[0], layouts[2]) > 3.9 * at_least(
      topologies[0], layouts[0]
    )
    common = dict(num_devices=4, work=work(layouts[0]))
    gib = 2**30
    return [
      Point(
        'v5p:2x2x1',
        layouts[0],
        'fits',
        memory={'a': 40 * gib},
        step_ms=3000.0,
        **common,
      ),
      Point(
        'v5p:2x2x1', layouts[1], 'too large', memory={'a': 140 * gib}, **common
      ),
      Point('v5p:2x2x1', layouts[2], 'skipped', message='at least'),
    ]

  monkeypatch.setattr(plan_lib, 'plan', plan)
  layout_search.run(**options)
  saved = json.loads((tmp_path / 'out' / 'plan.json').read_text())
  first, *others = saved['points']
  assert first['pareto']
  assert not any(p['pareto'] for p in others)
  mfu = saved['mfu'][0]
  assert 0 < mfu['causal'] < mfu['full_square'] < 1
  picture = (tmp_path / 'out' / 'plan.png').read_bytes()
  assert picture.startswith(b'\x89PNG')
  assert len(picture) < 200_000
  text = capsys.readouterr().out
  assert 'MFU' in text
  assert '* v5p:2x2x1 mesh=fsdp=4 remat=full' in text


@pytest.mark.parametrize(
  'changed, message',
  [
    (dict(topologies=['v9']), 'unknown chip'),
    (dict(choices_json='{'), 'choices='),
    (dict(choices_json='{"shape": [1]}'), 'shape unknown; known: mesh'),
  ],
)
def test_refuses(options, changed, message):
  with pytest.raises(ValueError, match=message):
    layout_search.run(**{**options, **changed})


def test_the_binary_refuses():
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.plan_for_tpu', '--preset=llama3-8b'],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode
  assert 'and --topologies=' in done.stderr
