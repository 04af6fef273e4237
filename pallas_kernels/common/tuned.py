"""Block sizes that the tuner has found, kept beside the kernel they are for.

`pallas_kernels/<op>/tuned.json` maps the name of a kernel's function to entries
`{chip, features, config, cycles}`, or `us` in place of `cycles` where a GPU was
timed; `experiments/benchmarks/tune.py` and `tune_gpu.py` write it.
"""

from collections.abc import Iterator, Mapping
import contextlib
import functools
import json
import math
import pathlib
from typing import Any, NamedTuple

_ROOT = pathlib.Path(__file__).parent.parent
# Of those who want to know what `lookup` is asked.
_LISTS: list[list['Question']] = []


class Question(NamedTuple):
  """Arguments of a `lookup`; `function` is never empty."""

  op: str
  function: str
  chip: str
  features: dict[str, Any]


@contextlib.contextmanager
def questions() -> Iterator[list[Question]]:
  """A list of what is looked up meanwhile: how the tuner knows what to write.

  Programs must be traced meanwhile, not before.
  """
  asked = []
  _LISTS.append(asked)
  try:
    yield asked
  finally:
    _LISTS.remove(asked)


def lookup(
  op: str, chip: str, features: Mapping[str, Any], *, function: str = ''
) -> dict[str, Any]:
  """Returns the configuration tuned for the most similar input.

  Args:
    op: Name of the op's folder.
    chip: Name in `tpu_compiler.CHIPS`.
    features: What describes the input: an entry applies if it has equal strings
      and truth values; its distance is the sum of |log2| of the ratios of the
      numbers.
    function: Which kernel of the op, by default the one of its name.

  Returns:
    Keyword arguments of the kernel; empty where no entry applies.
  """
  for asked in _LISTS:
    asked.append(Question(op, function or op, chip, dict(features)))
  found = [
    (_distance(entry['features'], features), i, entry['config'])
    for i, entry in enumerate(_entries(op).get(function or op, ()))
    if entry['chip'] == chip
  ]
  distance, _, config = min(found, default=(math.inf, 0, {}))
  return {} if distance == math.inf else dict(config)


@functools.cache
def _entries(op):
  path = _ROOT / op / 'tuned.json'
  return json.loads(path.read_text()) if path.exists() else {}


def _distance(entry, features):
  if entry.keys() != features.keys():
    return math.inf
  distance = 0.0
  for name, value in features.items():
    if isinstance(value, str | bool) or value is None:
      if entry[name] != value:
        return math.inf
    elif entry[name] != value:
      distance += abs(math.log2(max(entry[name], 0.5) / max(value, 0.5)))
  return distance
