"""Packs chunks of documents into rows, with grain's packing transformations.

What is packed are *indices* into the flat corpus, not tokens: packing the
global batch costs every process next to nothing, and each then gathers only its
own rows. So the global order does not depend on the number of processes.
"""

from collections.abc import Callable, Mapping
import types
from typing import Any

import grain
import numpy as np

from jaxtrain.data.corpus import Corpus

# Rows that are filled side by side. More rows mean less padding and more work
# to redo when an iterator is restored.
_NUM_OPEN_ROWS = 64


class Chunks:
  """Random access to documents cut every `seq_len` tokens.

  Chunk i is `{'index': int64 [n]}` with 1 <= n <= seq_len.
  """

  def __init__(self, corpus: Corpus, seq_len: int):
    per_document = -(-corpus.lengths // seq_len)
    document = np.repeat(np.arange(len(per_document)), per_document)
    first = np.cumsum(per_document) - per_document
    offset = (np.arange(len(document)) - first[document]) * seq_len
    self._starts = corpus.starts[document] + offset
    self._lengths = np.minimum(seq_len, corpus.lengths[document] - offset)

  def __len__(self) -> int:
    return len(self._starts)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    start = self._starts[i]
    return {'index': np.arange(start, start + self._lengths[i])}


def best_fit(chunks: grain.IterDataset, seq_len: int, seed: int | None):
  """Puts each chunk whole into the fullest open row that takes it.

  Ding et al., "Fewer Truncations Improve Language Modeling", ICML 2024,
  https://arxiv.org/abs/2404.10830, with a bounded number of open rows.
  """
  return _pack(grain.experimental.BestFitPackIterDataset, chunks, seq_len, seed)


def first_fit(chunks: grain.IterDataset, seq_len: int, seed: int | None):
  """Puts each chunk whole into the first open row that takes it."""
  return _pack(
    grain.experimental.FirstFitPackIterDataset, chunks, seq_len, seed
  )


def concat_then_split(
  chunks: grain.IterDataset, seq_len: int, seed: int | None
):
  """Fills every row to the end, cutting chunks: no padding (GPT-2, GPT-3)."""
  del seed  # Rows come in the order of the chunks.
  return grain.experimental.ConcatThenSplitIterDataset(
    chunks, length_struct={'index': seq_len}
  )


PACKINGS: Mapping[str, Callable[..., grain.IterDataset]] = (
  types.MappingProxyType(
    dict(
      best_fit=best_fit,
      first_fit=first_fit,
      concat_then_split=concat_then_split,
    )
  )
)


def _pack(cls, chunks, seq_len, seed):
  return cls(
    chunks,
    length_struct={'index': seq_len},
    num_packing_bins=_NUM_OPEN_ROWS,
    seed=seed or 0,
    shuffle_bins=seed is not None,
  )


def gather(
  rows: Mapping[str, np.ndarray], corpus: Corpus, pad_id: int
) -> dict[str, Any]:
  """Batch of `[B, T]` arrays from packed indices.

  Padding has index 0, where the corpus has a gap, and so it is found, like the
  end of a document, by the gap itself.
  """
  index = rows['index']
  tokens, targets = corpus.tokens[index], corpus.tokens[index + 1]
  padding = tokens == corpus.gap
  no_target = (targets == corpus.gap) | padding
  return {
    'tokens': np.where(padding, pad_id, tokens).astype(np.int32),
    'targets': np.where(no_target, pad_id, targets).astype(np.int32),
    'positions': rows['index_positions'],
    'segment_ids': rows['index_segment_ids'],
    'weights': np.where(no_target, np.float32(0), np.float32(1)),
  }
