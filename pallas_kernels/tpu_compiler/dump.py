"""The compiler's dump: which files of it are read, and finding them.

Each kernel (Pallas call or XLA fusion) has a listing of VLIW bundles before the
delay converter, `<n>-<kernel>-<k>-packed-bundles-post-ra.txt`: one bundle a
cycle. (`final_bundles` has its empty bundles folded away and undercounts.)
Beside it, `post-delay-converter` has the table of allocations, and
`pre-delay_hlo-static-per-bundle-utilization` the slots that each bundle uses.
"""

import dataclasses
import pathlib
import re

_LISTING = '-packed-bundles-post-ra.txt'
_ALLOCATIONS = '-post-delay-converter.txt'
_SLOTS = '-pre-delay_hlo-static-per-bundle-utilization.txt'
_PASSES = '(packed-bundles-post-ra|post-delay-converter|pre-delay)'
_FILE = re.compile(
  r'(?P<stem>\d+-.*)-\d+(?P<ending>'
  + '|'.join(map(re.escape, (_LISTING, _ALLOCATIONS, _SLOTS)))
  + ')'
)
_ALLOCATION_LINE = re.compile(r'^\s*#\w+ \[.*space=', re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class KernelFiles:
  """Files of one kernel.

  Attributes:
    name: Name of the HLO instruction.
    listing: Its bundles.
    allocations: Its table of allocations, if there is one.
    slots: Its slots per bundle, if they were written.
  """

  name: str
  listing: pathlib.Path
  allocations: pathlib.Path | None
  slots: pathlib.Path | None


def flags(folder: pathlib.Path) -> list[str]:
  """Flags that make libtpu write the dump into `folder`, and little else."""
  return [
    f'--xla_jf_dump_to={folder}',
    '--xla_jf_dump_llo_text=true',
    '--xla_jf_emit_annotations=true',
    f'--xla_jf_dump_llo_pass_label_regex={_PASSES}',
  ]


def prune(folder: pathlib.Path) -> None:
  """Removes what is not read; of the allocations' file, all but the table."""
  for path in sorted(folder.iterdir()):
    if path.name.endswith(_ALLOCATIONS):
      lines = path.read_text(errors='replace').splitlines(keepends=True)
      path.write_text(''.join(filter(_ALLOCATION_LINE.match, lines)))
    elif path.is_dir() or not path.name.endswith((_LISTING, _SLOTS)):
      _remove(path)


def kernel_files(folder: pathlib.Path) -> dict[str, KernelFiles]:
  """Finds the kernels of a dump, by name; the last compile of each counts."""
  paths, found = {}, {}
  for path in sorted(folder.iterdir()):
    if match := _FILE.fullmatch(path.name):
      paths.setdefault((match['stem'], match['ending']), path)
  for (stem, ending), listing in paths.items():
    name = stem.partition('-')[2]
    # 'TLP' is the top-level program, '<...>' are parts of the runtime.
    if ending == _LISTING and name != 'TLP' and not name.startswith('<'):
      found[name] = KernelFiles(
        name,
        listing,
        paths.get((stem, _ALLOCATIONS)),
        paths.get((stem, _SLOTS)),
      )
  return found


def _remove(path):
  if not path.is_dir():
    path.unlink()
    return
  for child in path.iterdir():
    _remove(child)
  path.rmdir()
