"""Memory of a device by what it holds, and what to change if it is too much."""

from collections.abc import Mapping
import dataclasses

GIB = 2**30
# Class of the arguments whose path starts so: those of a training step whose
# state has `params` and `opt_state`.
CLASSES: Mapping[str, str] = {
  '[0].params': 'parameters',
  '[0].opt_state': 'optimizer state',
}
OTHER = 'other arguments'
COLLECTIVES = 'collective buffers'
TEMPORARIES = 'activations and temporaries'


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of HBM per device.

  Attributes:
    arguments: Inputs.
    outputs: Results, those that reuse an input's memory included.
    aliased: Of the results, the bytes that reuse a donated input's memory.
    temporaries: Buffers for everything in between, some of which share memory
      with each other or with results.
    generated_code: The program itself.
    peak: The most that is in use at once, without the program. Also counts what
      is kept in VMEM, up to 128 MiB.
    collectives: Of the temporaries, the most that results of collectives take
      at once.
    host: Arguments and temporaries that are in the host's memory instead.
  """

  arguments: int
  outputs: int
  aliased: int
  temporaries: int
  generated_code: int
  peak: int
  collectives: int = 0
  host: int = 0

  @property
  def total(self) -> int:
    """What a device must have."""
    return self.peak + self.generated_code

  def fits(self, hbm_gib: float) -> bool:
    """Whether a device with `hbm_gib` GiB holds it."""
    return self.total <= hbm_gib * GIB

  def report(self) -> str:
    """A table, one kind of memory a line."""
    return table({**dataclasses.asdict(self), 'total': self.total})


def table(sizes: Mapping[str, int]) -> str:
  """Names and GiB, a line each."""
  width = max(map(len, sizes))
  return '\n'.join(
    f'  {name:<{width}}{size / GIB:>10.4f} GiB' for name, size in sizes.items()
  )


def by_class(
  memory: Memory,
  arguments: Mapping[str, int],
  classes: Mapping[str, str] = CLASSES,
) -> dict[str, int]:
  """Bytes at the peak by what they hold; they add up to `memory.total`.

  Args:
    memory: Of the program.
    arguments: Bytes per device of each argument, by its path.
    classes: Start of a path -> name of a class; the longest that fits counts.
  """
  found = argument_classes(arguments, classes)
  padding = memory.arguments - sum(found.values())
  if padding:
    found['padding of arguments'] = padding
  rest = memory.peak - memory.arguments
  collectives = min(memory.collectives, max(rest, 0))
  found[COLLECTIVES] = collectives
  found[TEMPORARIES] = rest - collectives
  found['program'] = memory.generated_code
  return {name: size for name, size in found.items() if size}


def argument_classes(
  arguments: Mapping[str, int], classes: Mapping[str, str] = CLASSES
) -> dict[str, int]:
  """Bytes of the arguments by class, in the order of `classes`."""
  found = dict.fromkeys(classes.values(), 0)
  for path, size in arguments.items():
    fitting = [start for start in classes if path.startswith(start)]
    name = classes[max(fitting, key=len)] if fitting else OTHER
    found[name] = found.get(name, 0) + size
  return {name: size for name, size in found.items() if size}


def advice(
  sizes: Mapping[str, int],
  whole: Mapping[str, int],
  num_devices: int,
  limit: float,
) -> str:
  """What to change for a program to fit, with what each change would free.

  Args:
    sizes: Bytes by class, see `by_class`.
    whole: Bytes of the argument classes over all devices, each element once.
    num_devices: Of the mesh.
    limit: Bytes that a device has.
  """
  total = sum(sizes.values())
  over = total - limit
  if over <= 0:
    return f'fits, with {-over / GIB:.2f} GiB to spare'
  largest = max(sizes, key=sizes.__getitem__)
  lines = [
    f'{over / GIB:.2f} GiB too much; largest: {largest}, '
    f'{sizes[largest] / GIB:.2f} GiB. What would free memory:'
  ]
  changes = _changes(sizes, whole, num_devices, over)
  for freed, text in sorted(changes, reverse=True):
    enough = ', enough' if freed >= over else ''
    lines.append(f'  {freed / GIB:.2f} GiB{enough}: {text}')
  if sum(freed for freed, _ in changes) < over:
    lines.append('  more devices, or smaller arguments: no change is enough')
  return '\n'.join(lines)


def _changes(sizes, whole, num_devices, over):
  """Bytes that a change frees, and the change."""
  found = []
  for name, size in sizes.items():
    share = whole.get(name, 0) / num_devices
    # What cannot be split, scalars and scales, is a small part.
    if share and size > 1.05 * share + 2**20:
      ways = whole[name] / size
      found.append(
        (
          int(size - share),
          f'split {name} over all {num_devices} devices, not {ways:.3g} (fsdp)',
        )
      )
  state = sizes.get('optimizer state', 0)
  if state:
    found.append((state, 'optimizer state in host memory (offload)'))
    found.append((state // 2, 'optimizer state in half the bytes (bfloat16)'))
  pages = sizes.get('KV pages', 0)
  if pages:
    keep = max(1 - over / pages, 0)
    found.append(
      (min(over, pages), f'{keep:.0%} of the KV pages (num_pages, kv_dtype)')
    )
  temporaries = sizes.get(TEMPORARIES, 0)
  if temporaries:
    parts = _parts(temporaries, over)
    found.append(
      (
        temporaries - temporaries // parts,
        f'{parts} times smaller micro-batches (accumulation), longer sequences '
        'over context or tensor, or a remat policy that saves less, at most',
      )
    )
  collectives = sizes.get(COLLECTIVES, 0)
  if collectives > 2**28:
    found.append(
      (
        collectives // 2,
        'half of each collective: a tensor or expert axis of 2 beside fsdp',
      )
    )
  return [(int(freed), text) for freed, text in found]


def _parts(temporaries, over):
  """The power of two that divides enough away, at most 64."""
  parts = 2
  while parts < 64 and temporaries - temporaries // parts < over:
    parts *= 2
  return parts
