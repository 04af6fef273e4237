"""Packed batches for a training loop: `make_dataset`."""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import grain
import numpy as np

from jaxtrain.checkpoints.tokenizer import Tokenizer
from jaxtrain.data import corpus as corpus_lib
from jaxtrain.data import packing as packing_lib

_STATE_VERSION = 1


def make_dataset(
  source: Sequence[str],
  tokenizer: Tokenizer,
  *,
  seq_len: int,
  batch_size: int,
  seed: int,
  num_epochs: int | None = None,
  shuffle: bool = True,
  process_index: int = 0,
  process_count: int = 1,
  packing: str = 'best_fit',
) -> 'Dataset':
  """Tokenizes, cuts, shuffles, packs, batches and shards documents.

  Every document becomes `bos ... eos` (where the tokenizer has them) and is cut
  into chunks of `seq_len`, the last one shorter. Chunks are shuffled globally,
  anew each epoch, and packed into rows.

  Documents are tokenized here, once, into memory, by every process.

  Args:
    source: Documents, for instance `get('stdlib')(split='train')`.
    tokenizer: See `jaxtrain.checkpoints.tokenizer`.
    seq_len: T, tokens in a row.
    batch_size: B, rows in the global batch.
    seed: Of the shuffle, in 0..2**32-1.
    num_epochs: Passes over the documents; `None` is without end. The last
      batch of a finite number is filled up with empty rows.
    shuffle: Whether chunks are shuffled; else they stay in order.
    process_index: Which share of every batch to make: rows
      `[i * B / n, (i + 1) * B / n)`.
    process_count: n, number of shares. Does not change the global batch.
    packing: 'best_fit' or 'first_fit' (chunks stay whole, some padding), or
      'concat_then_split' (no padding, chunks are cut at the ends of rows).

  Returns:
    A `Dataset`.

  Raises:
    ValueError: A size below 1, a batch that the processes do not divide, a
      seed out of range, an unknown packing, or documents without tokens.
  """
  _check(seq_len, batch_size, seed, num_epochs, process_index, process_count)
  if packing not in packing_lib.PACKINGS:
    raise ValueError(
      f'packing {packing!r} is not one of {", ".join(packing_lib.PACKINGS)}'
    )
  corpus = corpus_lib.tokenize(source, tokenizer, process_index == 0)
  chunks = grain.MapDataset.source(packing_lib.Chunks(corpus, seq_len))
  if shuffle:
    chunks = chunks.shuffle(seed=seed)
  # Without threads: indices are made faster than they are handed over.
  in_order = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  rows = packing_lib.PACKINGS[packing](
    chunks.repeat(num_epochs).to_iter_dataset(in_order),
    seq_len,
    seed if shuffle else None,
  )
  fill = functools.partial(
    grain.experimental.batch_and_pad, batch_size=batch_size
  )
  local = batch_size // process_count
  mine = slice(process_index * local, (process_index + 1) * local)
  pad_id = 0 if tokenizer.pad_id is None else tokenizer.pad_id

  def make_local_batch(batch):
    batch = {k: v[mine] for k, v in batch.items()}
    return packing_lib.gather(batch, corpus, pad_id)

  return Dataset(
    batches=rows.batch(batch_size, batch_fn=fill).map(make_local_batch),
    num_tokens=corpus.num_tokens,
    num_documents=len(corpus.lengths),
    signature={
      'version': _STATE_VERSION,
      'tokens_crc32': corpus.checksum,
      'num_tokens': corpus.num_tokens,
      'seq_len': seq_len,
      'batch_size': batch_size,
      'seed': seed if shuffle else None,
      'packing': packing,
    },
  )


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Iterable of batches, each time from the start.

  A batch is a dict of NumPy arrays `[B / process_count, T]`:

  * `tokens` int32;
  * `targets` int32: the next token of the same document;
  * `positions` int32: from 0 in every segment;
  * `segment_ids` int32: 1, 2, ... per chunk in a row, 0 for padding;
  * `weights` float32: 1, or 0 at padding and at the end of a document, where
    there is no next token.

  Attributes:
    batches: The grain pipeline.
    num_tokens: Tokens in one epoch, over all processes.
    num_documents: Documents in one epoch.
    signature: What must agree for a saved state to mean the same.
  """

  batches: grain.IterDataset
  num_tokens: int
  num_documents: int
  signature: dict[str, Any]

  def __iter__(self) -> 'DataIterator':
    return DataIterator(self)


class DataIterator:
  """Iterator over batches that can be saved and restored exactly."""

  def __init__(self, dataset: Dataset):
    self._signature = dataset.signature
    self._iterator = iter(dataset.batches)

  def __iter__(self) -> 'DataIterator':
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    return next(self._iterator)

  def get_state(self) -> dict[str, Any]:
    """Where the iterator stands: a small dict of JSON types.

    The same in every process, and valid for any number of them.
    """
    return {**self._signature, 'position': self._iterator.get_state()}

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues where `state` was taken, in this process or another.

    Raises:
      ValueError: The state belongs to other documents, or to another tokenizer,
        sequence length, batch size, seed or packing.
    """
    if not isinstance(state, dict) or 'position' not in state:
      raise ValueError(f'not a state of a data iterator: {state!r}')
    for name, value in self._signature.items():
      if state.get(name) != value:
        raise ValueError(
          f'the saved data state has {name}={state.get(name)!r}, this dataset '
          f'{value!r}: the batches would not continue where they stopped'
        )
    self._iterator.set_state(_with_tuples(state['position']))


def _with_tuples(state):
  """Undoes what JSON does: grain compares some of its entries to tuples."""
  if isinstance(state, dict):
    return {k: _with_tuples(v) for k, v in state.items()}
  return tuple(state) if isinstance(state, list) else state


def _check(seq_len, batch_size, seed, num_epochs, process_index, process_count):
  sizes = dict(
    seq_len=seq_len, batch_size=batch_size, process_count=process_count
  )
  if num_epochs is not None:
    sizes['num_epochs'] = num_epochs
  for name, value in sizes.items():
    if value < 1:
      raise ValueError(f'{name}={value} must be at least 1')
  if batch_size % process_count:
    raise ValueError(
      f'batch_size={batch_size} is not divisible by process_count='
      f'{process_count}'
    )
  if not 0 <= process_index < process_count:
    raise ValueError(
      f'process_index={process_index} is not in 0..{process_count - 1}'
    )
  if not 0 <= seed < 2**32:
    raise ValueError(f'seed={seed} is not in 0..2**32-1')
