"""The real training step, compiled for a slice that is not there."""

import dataclasses
import importlib.util
import json

from absl.testing import flagsaver
import jax
import pytest

from experiments import compile_for_tpu
from experiments import configs
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


@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason="needs the TPU compiler: pip install 'onemesh[tpu]'",
)
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
  assert 'of 16 GiB: fits; 1,024 tokens a step' in text
  record = json.loads(output.read_text())
  # Two devices share each parameter; AdamW keeps two moments of each.
  state = compile_for_tpu.TrainingStep(config)(jax.devices()[:4])[1][0]
  count = sum(x.size for x in jax.tree.leaves(state.params))
  scales = 128 * (2 * _TINY.num_layers + 1)
  memory = record['memory']
  assert memory['parameters'] == pytest.approx(4 * count / 2, abs=4 * scales)
  assert memory['optimizer'] == pytest.approx(
    2 * memory['parameters'], rel=1e-3
  )
  assert memory['batch'] == 5 * 8 * 128 * 4 // 4
  assert record['num_devices'] == 4
  assert {'fsdp', 'data'} <= {
    a for c in record['collectives'] for a in c['axes']
  }
  with flagsaver.flagsaver(**flags, check_hbm_gib=0.001):
    with pytest.raises(SystemExit, match='exceed 0.001 GiB'):
      compile_for_tpu.main(['compile_for_tpu'])


def test_the_step_is_that_of_training():
  step, (state, batch) = compile_for_tpu.TrainingStep(_config())(
    jax.devices()[:4]
  )
  new, metrics = jax.eval_shape(step, state, batch)
  assert jax.tree.structure(new) == jax.tree.structure(state)
  assert metrics['loss'].shape == ()
  assert batch['tokens'].shape == (8, 128)


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
    config = compile_for_tpu._from_flags()
  assert config['model'].embed_dim == 4096
  assert (config['seq_len'], config['remat'], config['mesh']) == (
    64,
    'full',
    'fsdp=4',
  )
  assert dataclasses.is_dataclass(config['model'])
