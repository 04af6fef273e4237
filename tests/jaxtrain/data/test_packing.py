"""Batches hold the documents' tokens as packing in plain Python does.

In most tests every token of the corpus has an id of its own and a document is a
run of ids, so a batch says by itself where each of its tokens came from.
"""

import collections
import itertools
import random

import numpy as np
import pytest

from jaxtrain.data import make_dataset
from jaxtrain.data.packing import PACKINGS

_KEYS = {
  'tokens': np.int32,
  'targets': np.int32,
  'positions': np.int32,
  'segment_ids': np.int32,
  'weights': np.float32,
}
_PAD = 9_999


class _Numbers:
  """Text '3 4 5' is tokens 3, 4, 5; no bos, no eos."""

  vocab_size = 10_000
  bos_id = eos_id = None
  pad_id = _PAD

  def encode(self, text, add_bos=False):
    return [int(word) for word in text.split()]


def _documents(lengths):
  ids = itertools.count()
  return [list(itertools.islice(ids, n)) for n in lengths]


def _lengths(seed, count=80, longest=40):
  rng = random.Random(seed)
  return [rng.randint(1, longest) for _ in range(count)]


def _dataset(documents, **kwargs):
  texts = [' '.join(map(str, d)) for d in documents]
  defaults = dict(seq_len=16, batch_size=4, seed=3, num_epochs=1)
  return make_dataset(texts, _Numbers(), **(defaults | kwargs))


def _segments(batches):
  """The token runs of equal segment id, in order, row by row."""
  for batch in batches:
    for tokens, ids in zip(batch['tokens'], batch['segment_ids'], strict=True):
      row = []
      for segment in range(1, ids.max() + 1):
        (where,) = np.nonzero(ids == segment)
        assert np.all(np.diff(where) == 1), 'a segment is one run'
        row.append(tokens[where].tolist())
      assert np.all(tokens[ids == 0] == _PAD)
      yield row


def _chunks(documents, seq_len):
  return [
    d[i : i + seq_len] for d in documents for i in range(0, len(d), seq_len)
  ]


def _plain_fit(chunks, seq_len, best):
  """Best or first fit into 64 open rows, closed when a chunk fits in none."""
  rows = [[] for _ in range(64)]
  used = lambda row: sum(map(len, row))
  for chunk in chunks:
    takers = [r for r in rows if used(r) + len(chunk) <= seq_len]
    if not takers:
      yield from (r for r in rows if r)
      rows = [[] for _ in range(64)]
      takers = rows
    (max(takers, key=used) if best else takers[0]).append(chunk)
  yield from (r for r in rows if r)


def _plain_concat(chunks, seq_len):
  row = []
  for chunk in chunks:
    while chunk:
      room = seq_len - sum(map(len, row))
      row.append(chunk[:room])
      chunk = chunk[room:]
      if sum(map(len, row)) == seq_len:
        yield row
        row = []
  if row:
    yield row


_PLAIN = {
  'best_fit': lambda c, t: _plain_fit(c, t, best=True),
  'first_fit': lambda c, t: _plain_fit(c, t, best=False),
  'concat_then_split': _plain_concat,
}


def test_every_packing_is_tested():
  assert set(_PLAIN) == set(PACKINGS)


@pytest.mark.parametrize('packing', PACKINGS)
@pytest.mark.parametrize('seq_len', [1, 7, 16, 64])
def test_rows_equal_plain_packing(packing, seq_len):
  documents = _documents(_lengths(seq_len))
  batches = _dataset(documents, packing=packing, seq_len=seq_len, shuffle=False)
  rows = [r for r in _segments(batches) if r]  # The last batch has empty rows.
  assert rows == list(_PLAIN[packing](_chunks(documents, seq_len), seq_len))


@pytest.mark.parametrize('packing', PACKINGS)
@pytest.mark.parametrize('seed', range(4))
def test_an_epoch_has_every_token_once_and_right_targets(packing, seed):
  documents = _documents(_lengths(seed))
  ends = {d[-1] for d in documents}
  dataset = _dataset(documents, packing=packing, seed=seed)
  seen = collections.Counter()
  for batch in dataset:
    assert {k: v.dtype.type for k, v in batch.items()} == _KEYS
    assert all(v.shape == (4, 16) for v in batch.values())
    for token, target, weight, segment in zip(
      *(batch[k].ravel() for k in ('tokens', 'targets', 'weights')),
      batch['segment_ids'].ravel(),
      strict=True,
    ):
      if segment == 0:
        assert (token, target, weight) == (_PAD, _PAD, 0)
        continue
      seen[int(token)] += 1
      if token in ends:
        assert (target, weight) == (_PAD, 0)
      else:
        assert (target, weight) == (token + 1, 1)
  assert seen == collections.Counter(range(dataset.num_tokens))
  assert dataset.num_tokens == sum(map(len, documents))
  assert dataset.num_documents == len(documents)


@pytest.mark.parametrize('packing', PACKINGS)
def test_segments_are_runs_of_one_document_from_position_zero(packing):
  documents = _documents(_lengths(5))
  owner = {t: i for i, d in enumerate(documents) for t in d}
  batches = list(_dataset(documents, packing=packing))
  for row in _segments(batches):
    for run in row:
      assert run == list(range(run[0], run[0] + len(run)))
      assert owner[run[0]] == owner[run[-1]]
  for batch in batches:
    for ids, positions in zip(
      batch['segment_ids'], batch['positions'], strict=True
    ):
      count = collections.Counter()
      for segment, position in zip(ids, positions, strict=True):
        assert position == (count[segment] if segment else 0)
        count[segment] += 1
      # Segments are numbered from the left, padding comes last.
      order = [s for s, _ in itertools.groupby(ids)]
      assert [s for s in order if s] == list(
        range(1, len(count) - (0 in count) + 1)
      )
      assert 0 not in order[:-1]


def test_bos_and_eos_frame_each_document():
  class Framed(_Numbers):
    bos_id, eos_id = 7_000, 7_001

  (batch,) = make_dataset(
    ['1 2', '3'],
    Framed(),
    seq_len=8,
    batch_size=1,
    seed=0,
    num_epochs=1,
    shuffle=False,
  )
  assert batch['tokens'].tolist() == [[7000, 1, 2, 7001, 7000, 3, 7001, _PAD]]
  assert batch['targets'].tolist() == [[1, 2, 7001, _PAD, 3, 7001, _PAD, _PAD]]
  assert batch['weights'].tolist() == [[1, 1, 1, 0, 1, 1, 0, 0]]
  assert batch['segment_ids'].tolist() == [[1, 1, 1, 1, 2, 2, 2, 0]]
  assert batch['positions'].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]


def test_epochs_are_complete_and_in_different_orders():
  documents = _documents(_lengths(6))
  batches = list(_dataset(documents, num_epochs=2, packing='concat_then_split'))
  tokens = np.concatenate([b['tokens'].ravel() for b in batches])
  tokens = tokens[tokens != _PAD]
  first, second = np.split(tokens, 2)
  everything = np.arange(sum(map(len, documents)))
  np.testing.assert_array_equal(np.sort(first), everything)
  np.testing.assert_array_equal(np.sort(second), everything)
  assert np.any(first != second)
  assert np.any(first != everything)


def test_goes_on_for_ever_by_default():
  dataset = _dataset(_documents([5, 30]), num_epochs=None)
  seen = collections.Counter()
  for batch in itertools.islice(dataset, 60):
    seen.update(batch['tokens'][batch['segment_ids'] > 0].tolist())
  assert set(seen) == set(range(35))
  assert max(seen.values()) - min(seen.values()) <= 64 + 1


def test_long_documents_leave_little_padding():
  documents = _documents([1000, 37, 500, 900, 800, 3, 3000, 411])
  batches = list(_dataset(documents, seq_len=16, num_epochs=8))
  filled = np.concatenate([b['segment_ids'] > 0 for b in batches[:-1]])
  assert filled.mean() > 0.97
