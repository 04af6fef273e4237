"""Documents as one flat array of tokens."""

from collections.abc import Iterator, Sequence
import dataclasses
import zlib

import numpy as np
import tqdm

from jaxtrain.checkpoints.tokenizer import Tokenizer

_BATCH_CHARS = 1 << 20  # Text given to the tokenizer at once.


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Tokenized documents, end to end.

  Attributes:
    tokens: `[S]` uint16 or uint32. A `gap` stands in front of each document
      and behind the last, so `tokens[i + 1]` is the next token of the same
      document or a gap, and `tokens[0]` is a gap.
    starts: `[N]` int64, each document's first token.
    lengths: `[N]` int64, each document's number of tokens.
  """

  tokens: np.ndarray
  starts: np.ndarray
  lengths: np.ndarray

  @property
  def gap(self) -> int:
    """The value that is no token: the greatest of the dtype."""
    return np.iinfo(self.tokens.dtype).max

  @property
  def num_tokens(self) -> int:
    """Tokens, without gaps."""
    return int(self.lengths.sum())

  @property
  def checksum(self) -> int:
    """CRC-32 of all tokens and document boundaries."""
    return zlib.crc32(self.tokens)


def tokenize(
  documents: Sequence[str], tokenizer: Tokenizer, show_progress: bool = True
) -> Corpus:
  """Tokenizes every document, between `bos_id` and `eos_id` if these exist.

  Memory: two bytes a token, four if the vocabulary has 65,535 ids or more.

  Args:
    documents: Their text.
    tokenizer: Makes the ids.
    show_progress: Whether to show a bar if it takes longer than two seconds.

  Returns:
    The corpus.

  Raises:
    ValueError: No tokens at all, or an id that is not below `vocab_size`.
  """
  dtype = np.uint16 if tokenizer.vocab_size < 2**16 - 1 else np.uint32
  gap = np.full(1, np.iinfo(dtype).max, dtype)
  head = [i for i in [tokenizer.bos_id] if i is not None]
  tail = [i for i in [tokenizer.eos_id] if i is not None]
  head, tail = np.array(head, dtype), np.array(tail, dtype)
  parts, lengths = [gap], []
  for ids in _encode(documents, tokenizer, show_progress):
    _check_ids(ids, tokenizer)
    if length := len(head) + len(ids) + len(tail):
      parts += [head, ids.astype(dtype), tail, gap]
      lengths.append(length)
  if not lengths:
    raise ValueError(f'{len(documents)} documents hold no tokens')
  lengths = np.array(lengths, np.int64)
  starts = 1 + np.concatenate([[0], np.cumsum(lengths[:-1] + 1)])
  return Corpus(np.concatenate(parts), starts, lengths)


def _encode(
  documents: Sequence[str], tokenizer: Tokenizer, show_progress: bool
) -> Iterator[np.ndarray]:
  encode_batch = getattr(tokenizer, 'encode_batch', None) or (
    lambda texts: [np.array(tokenizer.encode(t), np.int64) for t in texts]
  )
  batch, size = [], 0
  for i in tqdm.tqdm(
    range(len(documents)),
    'tokenizing',
    unit='doc',
    delay=2,
    disable=not show_progress,
  ):
    batch.append(documents[i])
    size += len(batch[-1])
    if size >= _BATCH_CHARS or i == len(documents) - 1:
      yield from encode_batch(batch)
      batch, size = [], 0


def _check_ids(ids, tokenizer):
  if len(ids) and (ids.min() < 0 or ids.max() >= tokenizer.vocab_size):
    raise ValueError(
      f'{tokenizer} made ids {ids.min()}..{ids.max()}, but its vocab_size is '
      f'{tokenizer.vocab_size}'
    )
