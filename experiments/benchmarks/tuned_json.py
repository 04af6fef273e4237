"""The `tuned.json` of an op; see `pallas_kernels.common.tuned`."""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

Entries = dict[str, list[dict[str, Any]]]


def read(path: pathlib.Path) -> Entries:
  """Entries by the name of the function that looks them up."""
  return json.loads(path.read_text()) if path.exists() else {}


def find(
  path: pathlib.Path, function: str, chip: str, features: Mapping[str, Any]
) -> dict[str, Any] | None:
  """The entry for exactly this input, if there is one."""
  for entry in read(path).get(function, ()):
    if entry['chip'] == chip and entry['features'] == features:
      return entry
  return None


def keep(path: pathlib.Path, function: str, entry: dict[str, Any]) -> None:
  """Adds an entry, in place of the one for the same chip and input."""
  entries = read(path)
  key = lambda e: (e['chip'], e['features'])
  kept = [e for e in entries.get(function, ()) if key(e) != key(entry)]
  _write(path, entries | {function: [*kept, entry]})


def _write(path, entries):
  lines = [
    f'"{function}": [\n'
    + ',\n'.join(f' {json.dumps(entry)}' for entry in found)
    + '\n]'
    for function, found in entries.items()
  ]
  path.write_text('{\n' + ',\n'.join(lines) + '\n}\n')
