"""Saves a tree as orbax does, then makes the checksums of what was written.

Every process reads back the files that it wrote, which the operating system
still holds in memory, in the thread that orbax wrote them in: training does not
wait, and no process reads what others wrote.
"""

from collections.abc import Callable, Sequence
import dataclasses
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxtrain.checkpoints import abstract
from jaxtrain.checkpoints import file_list
from jaxtrain.checkpoints import ocdbt_values


class CheckedHandler(ocp.PyTreeCheckpointHandler):
  """Orbax's handler of pytrees, with checksums.

  Args:
    on_error: Told what stopped this process's part of a save.
    **options: Of orbax's handler.
  """

  def __init__(self, on_error: Callable[[BaseException], None], **options: Any):
    super().__init__(**options)
    self._on_error = on_error

  async def async_save(self, directory, item=None, save_args=None, args=None):
    """See orbax; the futures are done when the checksums are written too."""
    names = [] if args is None else abstract.leaves(args.item)
    names = {name.replace('/', '.'): name for name in names}
    writes = await super().async_save(directory, item, save_args, args)
    return [_Checked(writes or (), directory, names, self._on_error)]

  def finalize(self, directory):
    """See orbax: one process puts the databases of all together."""
    try:
      super().finalize(directory)
    except BaseException as e:
      self._on_error(e)
      raise


class _Checked:
  """A future of orbax's: the writes of this process, then their checksums."""

  def __init__(self, writes: Sequence[Any], directory, names, on_error):
    self._writes, self._directory = writes, directory
    self._names, self._on_error = names, on_error

  def result(self, timeout=None):
    try:
      for write in self._writes:
        write.result(timeout=timeout)
      self._write_checksums()
    except BaseException as e:
      self._on_error(e)
      raise

  def cancel(self):
    for write in self._writes:
      write.cancel()

  def _write_checksums(self):
    # Until it is made, orbax gives the promise of a path.
    directory = getattr(self._directory, 'path', self._directory)
    if '://' in str(directory):
      return
    folder = pathlib.Path(directory)
    process = jax.process_index()
    own = folder / f'ocdbt.process_{process}'
    if own.exists():  # It wrote something.
      spans, grids = ocdbt_values.spans(own, self._names)
      spans = [
        dataclasses.replace(s, file=f'{own.name}/{s.file}') for s in spans
      ]
      file_list.write_share(folder, process, spans, grids)
