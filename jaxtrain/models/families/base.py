"""Interface of a family: its config.json and its tensors, both ways.

A `Weight` says how one of our parameters lies in somebody else's file. Both
layouts are words over the letters of `ModelConfig`: a parameter with dimensions
'L D N H' whose file holds, for every layer, a matrix 'NH D' is transposed,
reshaped and sliced by the words alone, so that reading, writing and reading
just one shard are one piece of code.

Letters: L layers, V vocab, D model, N query heads, K kv heads, H head dim,
F feed-forward, E experts.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from jaxtrain.models.config import ModelConfig
from jaxtrain.models.families import _config_json
from jaxtrain.models.families import _rope_json


@dataclasses.dataclass(frozen=True)
class Weight:
  """How one parameter is stored.

  Attributes:
    name: Name of the tensor; letters in braces are dimensions of ours that are
      spread over several tensors, 'model.layers.{L}.mlp.up_proj.weight'.
    ours: Dimensions of the parameter, 'L D F'; those in `name` come first.
    theirs: Dimensions of the tensor, 'F D'. Letters written together are one
      dimension, 'NH D'. A digit is half a dimension: '0F' the first F rows of
      2F, '1F' the last.
    is_interleaved: Whether H is stored as pairs (i, i + H/2), one after the
      other, as llama.cpp does for Llama.
    plus: What is added to the parameter when stored.
  """

  name: str
  ours: str
  theirs: str
  is_interleaved: bool = False
  plus: float = 0.0


# Path of a parameter -> the ways it may be stored, the way we write it first.
WeightMap = dict[str, tuple[Weight, ...]]


@dataclasses.dataclass(frozen=True)
class Family:
  """A published family.

  Attributes:
    name: Name of the file.
    model_types: Values of `model_type` in config.json; the first is written.
    architecture: Class of the family in `transformers`.
    read: Builds the `ModelConfig` from a `Reader` of config.json.
    write: The keys of config.json beside those that every family has.
    weights: The weight map of a config.
    tensor_name: Our spelling of a tensor's name; `None` if the tensor is not
      part of the decoder (the vision tower of Gemma 3).
    sizes: Published models by name.
  """

  name: str
  model_types: tuple[str, ...]
  architecture: str
  read: Callable[[_config_json.Reader], ModelConfig]
  write: Callable[[ModelConfig], dict[str, Any]]
  weights: Callable[[ModelConfig], WeightMap]
  tensor_name: Callable[[str], str | None] = lambda name: name
  sizes: Mapping[str, ModelConfig] = dataclasses.field(default_factory=dict)

  def config_from_hf(self, config_json: Mapping[str, Any]) -> ModelConfig:
    """Reads a Hugging Face config.json, as transformers 4 or 5 write it.

    Raises:
      ValueError: A missing key, a value of the wrong type, or a switch that
        `ModelConfig` does not have.

    Warns:
      UserWarning: Keys that nobody here knows.
    """
    reader = _config_json.Reader(config_json, self.name)
    try:
      config = self.read(reader)
    except ValueError as e:
      message = str(e)
      prefix = '' if message.startswith('config.json') else 'config.json: '
      raise ValueError(f'{prefix}{message}') from e
    reader.warn_of_unread()
    return config

  def config_to_hf(self, config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of `config`, for transformers 4 and 5.

    Raises:
      ValueError: The family cannot express the config; the fields are named.
    """
    out = {
      'architectures': [self.architecture],
      'model_type': self.model_types[0],
      **_config_json.shared_keys(config),
      **self.write(config),
    }
    want, got = canonical(config), canonical(self.config_from_hf(out))
    lost = [
      f'{f.name}={getattr(want, f.name)!r}'
      for f in dataclasses.fields(ModelConfig)
      if getattr(want, f.name) != getattr(got, f.name)
    ]
    if lost:
      raise ValueError(
        f'family {self.name!r} cannot express {", ".join(lost)}; choose '
        'another `family` for this config'
      )
    return out


def dim_sizes(config: ModelConfig) -> dict[str, int]:
  """The size of every letter."""
  return dict(
    L=config.num_layers,
    V=config.vocab_size,
    D=config.embed_dim,
    N=config.num_heads,
    K=config.num_kv_heads,
    H=config.head_dim,
    F=config.moe.mlp_dim if config.moe else config.mlp_dim,
    E=config.moe.num_experts if config.moe else 0,
  )


def canonical(config: ModelConfig) -> ModelConfig:
  """Spells a config in the one way that equal models share."""
  types = config.layer_types
  has_sliding, has_full = 'sliding' in types, 'full' in types
  rope = _rope_json.canonical(config.rope)
  sliding_rope = config.sliding_rope and _rope_json.canonical(
    config.sliding_rope
  )
  if not has_sliding or sliding_rope == rope:
    sliding_rope = None
  elif not has_full and sliding_rope:
    rope, sliding_rope = sliding_rope, None
  scale = config.query_scale
  return dataclasses.replace(
    config,
    layer_pattern=_config_json.shortest_pattern(types),
    sliding_window=config.sliding_window if has_sliding else None,
    rope=rope,
    sliding_rope=sliding_rope,
    query_scale=None if scale == config.head_dim**-0.5 else scale,
    # No dense layer has this size.
    mlp_dim=config.moe.mlp_dim if config.moe else config.mlp_dim,
  )
