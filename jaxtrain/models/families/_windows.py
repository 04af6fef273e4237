"""Which layers have a sliding window, as config.json says it."""

from typing import Any

from jaxtrain.models.config import ModelConfig
from jaxtrain.models.families import _config_json


def hf_layer_types(config: ModelConfig) -> list[str]:
  """`layer_types` of config.json."""
  spelling = {ours: theirs for theirs, ours in _config_json.LAYER_TYPES.items()}
  return [spelling[t] for t in config.layer_types]


def is_sliding(config: ModelConfig) -> bool:
  """Whether any layer has a window."""
  return 'sliding' in config.layer_types


def window(config: ModelConfig) -> int | None:
  """`sliding_window` of config.json; null if no layer has one."""
  return config.sliding_window if is_sliding(config) else None


def uniform_window(
  reader: _config_json.Reader, window: int | None
) -> dict[str, Any]:
  """Fields of a model whose layers all have the window, if there is one."""
  kind = 'sliding' if window else 'full'
  pattern = reader.layer_pattern([kind] * reader.integer('num_hidden_layers'))
  return dict(sliding_window=window, layer_pattern=pattern)


def read_late_windows(reader: _config_json.Reader) -> dict[str, Any]:
  """Fields of Qwen: windows, if used, from layer `max_window_layers` on."""
  window = reader.window(absent=4096)
  first = reader.integer('max_window_layers', 28, minimum=0)
  if not reader.boolean('use_sliding_window', False):
    window = None
  default = [
    'sliding' if window and i >= first else 'full'
    for i in range(reader.integer('num_hidden_layers'))
  ]
  return dict(
    sliding_window=window, layer_pattern=reader.layer_pattern(default)
  )


def write_late_windows(config: ModelConfig) -> dict[str, Any]:
  """Keys of `read_late_windows`."""
  types = config.layer_types
  first = types.index('sliding') if is_sliding(config) else len(types)
  return dict(
    use_sliding_window=is_sliding(config),
    sliding_window=window(config),
    max_window_layers=first,
    layer_types=hf_layer_types(config),
  )
