"""The real training step, compiled for a slice that is not there."""

import dataclasses
import importlib.util
import json

from absl.testing import flagsaver
import jax
import pytest

from experiments import choices
from experiments import compile_for_tpu
from experiments import configs
from experiments.tpu_programs import TrainingStep
from jaxtrain.models.config import ModelConfig

_TINY = ModelConfig(
  vocab_size=256,
  embed_dim=128,
  num_layers=1,
  num_heads=2,
  num_kv_heads=1,
  head_dim=64,
  mlp_dim=256,
  max_seq_len=256,
)


def _config(**changes):
  small = dict(model=_TINY, seq_len=128, batch_size=8, mesh='data=2,fsdp=2')
  return {**configs.load('quickstart'), **small, **changes}


_needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason="needs the TPU compiler: pip install 'onemesh[tpu]'",
)


@_needs_libtpu
def test_prints_and_checks(tmp_path, capsys, monkeypatch):
  config = _config()
  monkeypatch.setattr(configs, 'load', lambda *_: dict(config))
  output = tmp_path / 'out.json'
  flags = dict(
    config='tiny',
    topology='v5e:2x2',
    output=str(output),
    cache_dir=str(tmp_path / 'cache'),
  )
  with flagsaver.flagsaver(**flags):
    compile_for_tpu.main(['compile_for_tpu'])
  text = capsys.readouterr().out
  assert 'of 16 GiB: fits' in text
  assert '1,024 tokens a step' in text
  assert 'could not be timed' not in text
  record = json.loads(output.read_text())['training step']
  # Two devices share each parameter; AdamW keeps two moments of each.
  state = TrainingStep(config)(jax.devices()[:4])[1][0]
  count = sum(x.size for x in jax.tree.leaves(state.params))
  scales = 128 * (2 * _TINY.num_layers + 1)
  memory = record['memory']
  assert memory['parameters'] == pytest.approx(4 * count / 2, abs=4 * scales)
  assert memory['optimizer state'] == pytest.approx(
    2 * memory['parameters'], rel=1e-3
  )
  assert memory['batch'] == 5 * 8 * 128 * 4 // 4
  assert record['num_devices'] == 4
  assert {'fsdp', 'data'} <= {
    a for c in record['collectives'] for a in c['axes']
  }
  assert record['cost']['step_ms'] > 0
  limits = dict(check_hbm_gib=0.001, check_exposed_ms=0.0)
  with flagsaver.flagsaver(**flags, **limits):
    with pytest.raises(SystemExit, match='exceed 0.001 GiB') as caught:
      compile_for_tpu.main(['compile_for_tpu'])
  assert 'exposed collectives exceed 0 ms' in str(caught.value)


@_needs_libtpu
def test_serving(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(choices, 'published', lambda name: _TINY)
  engine = dict(
    max_num_requests=4, max_seq_len=128, max_step_tokens=8, token_buckets=[8]
  )
  with flagsaver.flagsaver(
    serve=True,
    preset='tiny',
    topology='v5e:2x2',
    mesh='tensor=2',
    engine=json.dumps(engine),
    cache_dir=str(tmp_path),
  ):
    compile_for_tpu.main(['compile_for_tpu'])
  text = capsys.readouterr().out
  assert '8 tokens on v5e:2x2' in text
  assert 'KV pages' in text


@pytest.mark.parametrize(
  'flags, message',
  [
    (dict(preset='llama3-8b'), 'give --topology='),
    (dict(topology='v5e'), 'give --preset=, or --config='),
    (dict(topology='v5e', preset='gpt5'), 'unknown preset .*llama3-8b'),
    (dict(topology='v9', preset='llama3-8b'), 'unknown chip'),
    (
      dict(topology='v5e', preset='llama3-8b', override=['a=1']),
      '--override changes',
    ),
    (dict(topology='v5e', config='nothing'), "no config 'nothing'"),
    (dict(topology='v5e', serve=True), '--serve needs --preset='),
    (
      dict(topology='v5e', serve=True, preset='llama3-8b', engine='{"a": 1}'),
      '--engine=',
    ),
  ],
)
def test_refuses(flags, message):
  with flagsaver.flagsaver(**flags):
    with pytest.raises(SystemExit, match=message):
      compile_for_tpu.main(['compile_for_tpu'])


def test_presets_are_the_published_sizes():
  with flagsaver.flagsaver(
    topology='v5e', preset='llama3-8b', seq_len=64, remat='full', mesh='fsdp=4'
  ):
    config = compile_for_tpu.training_program().config
  assert config['model'].embed_dim == 4096
  assert (config['seq_len'], config['remat'], config['mesh']) == (
    64,
    'full',
    'fsdp=4',
  )
  assert dataclasses.is_dataclass(config['model'])
