"""What every scenario of the serving benchmark is told."""

from collections.abc import Mapping
import dataclasses
import functools
import json
import pathlib
from typing import Any

from experiments.benchmarks import serving_models
from experiments.benchmarks.serving_models import Model


@dataclasses.dataclass(frozen=True)
class Settings:
  """Where and how large.

  Attributes:
    directory: Scratch folder: models, compiled programs.
    core: The core that every engine is pinned to.
    peer_python: Interpreter that has the other engines, or `None`.
    rounds: Warm rounds of each engine.
    requests: Bound on the number of requests, for trying things out.
    engine: Arguments of `EngineConfig` beyond those a scenario needs.
    pictures: Folder for pictures.
  """

  directory: pathlib.Path
  core: int
  peer_python: str | None
  rounds: int
  requests: int | None
  engine: Mapping[str, Any]
  pictures: pathlib.Path

  def count(self, requests: int) -> int:
    """`requests`, within the bound."""
    return min(requests, self.requests or requests)

  @property
  def programs(self) -> pathlib.Path:
    """Folder of compiled programs that the processes of a run share."""
    return self.directory / 'programs'

  @functools.cache  # noqa: B019 (one object, alive as long as the program)
  def model(self, name: str) -> Model:
    """Writes 'qwen3-27m', 'qwen3-tiny' or 'gemma3-270m', once."""
    directory = self.directory / name
    if name == 'gemma3-270m':
      return serving_models.write_gemma(directory)
    configs = {
      'qwen3-27m': serving_models.QWEN3_27M,
      'qwen3-tiny': serving_models.QWEN3_TINY,
    }
    return serving_models.write_random(configs[name], directory)

  def job(self, model: str, **arguments: Any) -> dict[str, Any]:
    """What a process is told: core, model, engine, and `arguments`."""
    found = self.model(model)
    return dict(
      core=self.core,
      model=found.directory,
      gguf=found.gguf,
      engine=dict(self.engine),
      **arguments,
    )

  def __hash__(self):
    return hash(self.directory)


def emit(**record: Any) -> None:
  """Prints one JSON line."""
  print(json.dumps(record), flush=True)
