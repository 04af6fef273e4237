"""The stream of batches: deterministic, divisible, resumable, fast."""

import itertools
import json
import os
import pathlib
import random
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest

from jaxtrain import data
from jaxtrain.checkpoints.tokenizer import ByteTokenizer
from jaxtrain.data.packing import PACKINGS

_ROOT = pathlib.Path(__file__).parents[3]
_DOCUMENTS = [f'{i}: ' + 'abcdefg hijklmnop' * (i * 7 % 11) for i in range(150)]


def _dataset(documents=_DOCUMENTS, **kwargs):
  defaults = dict(seq_len=32, batch_size=8, seed=11)
  return data.make_dataset(documents, ByteTokenizer(), **(defaults | kwargs))


def _assert_equal(batches, expected):
  for batch, want in zip(batches, expected, strict=True):
    assert batch.keys() == want.keys()
    for key in want:
      np.testing.assert_array_equal(batch[key], want[key], err_msg=key)


def _take(iterator, count):
  return list(itertools.islice(iterator, count))


@pytest.mark.parametrize('packing', PACKINGS)
def test_the_seed_decides_everything(packing):
  first = _take(_dataset(packing=packing), 40)
  _assert_equal(_take(_dataset(packing=packing), 40), first)
  (batch,) = _take(_dataset(packing=packing, seed=12), 1)
  assert np.any(batch['tokens'] != first[0]['tokens'])


@pytest.mark.parametrize('packing', PACKINGS)
@pytest.mark.parametrize('process_count', [2, 4])
def test_shares_of_processes_join_to_the_global_batch(packing, process_count):
  kwargs = dict(packing=packing, num_epochs=1)
  whole = list(_dataset(**kwargs))
  shares = [
    list(_dataset(process_index=i, process_count=process_count, **kwargs))
    for i in range(process_count)
  ]
  joined = [
    {k: np.concatenate([s[k] for s in step]) for k in step[0]}
    for step in zip(*shares, strict=True)
  ]
  _assert_equal(joined, whole)


@pytest.mark.parametrize('packing', PACKINGS)
@pytest.mark.parametrize('num_epochs', [None, 2])
def test_resumes_exactly_at_any_step(packing, num_epochs):
  dataset = _dataset(packing=packing, num_epochs=num_epochs)
  iterator, states, batches = iter(dataset), [], []
  for _ in range(150):
    states.append(json.dumps(iterator.get_state()))
    if (batch := next(iterator, None)) is None:
      break
    batches.append(batch)
  assert len(batches) > 60  # Past the end of the first epoch.
  assert max(map(len, states)) < 1000
  rng = random.Random(0)
  last = len(states) - 1
  for at in [0, 1, last, *(rng.randrange(len(states)) for _ in range(20))]:
    iterator = iter(dataset)
    for _ in range(rng.randrange(4)):  # Where it stood before does not matter.
      next(iterator)
    iterator.set_state(json.loads(states[at]))
    assert json.dumps(iterator.get_state()) == states[at]
    count = min(5, len(batches) - at)
    _assert_equal(_take(iterator, count), batches[at : at + count])


def test_any_number_of_processes_continues():
  whole = _take(_dataset(), 6)
  iterator = iter(_dataset(process_index=1, process_count=4))
  _take(iterator, 4)
  state = iterator.get_state()
  iterator = iter(_dataset(process_index=0, process_count=2))
  iterator.set_state(state)
  expected = [{k: v[:4] for k, v in b.items()} for b in whole[4:]]
  _assert_equal(_take(iterator, 2), expected)


_CHILD = """
import json, sys, zlib
from jaxtrain import data
from jaxtrain.checkpoints.tokenizer import ByteTokenizer
documents, state = json.load(sys.stdin)
iterator = iter(data.make_dataset(
  documents, ByteTokenizer(), seq_len=32, batch_size=8, seed=11))
iterator.set_state(state)
for _ in range(3):
  batch = next(iterator)
  print(*(zlib.crc32(batch[k].tobytes()) for k in sorted(batch)))
"""


def test_a_fresh_process_continues():
  iterator = iter(_dataset())
  _take(iterator, 17)
  state = iterator.get_state()
  child = subprocess.run(
    [sys.executable, '-c', _CHILD],
    input=json.dumps([_DOCUMENTS, state]),
    env={**os.environ, 'PYTHONPATH': str(_ROOT), 'PYTHONHASHSEED': '77'},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert child.returncode == 0, child.stderr
  expected = [
    ' '.join(str(zlib.crc32(b[k].tobytes())) for k in sorted(b))
    for b in _take(iterator, 3)
  ]
  assert child.stdout.split('\n')[:3] == expected


@pytest.mark.parametrize(
  'change, name',
  [
    (dict(documents=_DOCUMENTS[1:]), 'tokens_crc32'),
    (dict(documents=_DOCUMENTS[::-1]), 'tokens_crc32'),
    (dict(seq_len=16), 'seq_len'),
    (dict(batch_size=4), 'batch_size'),
    (dict(seed=12), 'seed'),
    (dict(shuffle=False), 'seed'),
    (dict(packing='first_fit'), 'packing'),
  ],
)
def test_state_of_another_stream_is_refused(change, name):
  state = iter(_dataset()).get_state()
  with pytest.raises(ValueError, match=f'has {name}='):
    iter(_dataset(**change)).set_state(state)


def test_more_epochs_continue_the_same_stream():
  batches = list(_dataset(num_epochs=1))
  iterator = iter(_dataset(num_epochs=1))
  _take(iterator, 5)
  longer = iter(_dataset(num_epochs=3))
  longer.set_state(iterator.get_state())
  _assert_equal(_take(longer, 2), batches[5:7])


@pytest.mark.parametrize('state', [None, {}, {'seed': 11}, [1]])
def test_what_is_no_state_is_refused(state):
  with pytest.raises(ValueError, match='not a state'):
    iter(_dataset()).set_state(state)


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(seq_len=0), 'seq_len=0 must be at least 1'),
    (dict(batch_size=0), 'batch_size=0 must be at least 1'),
    (dict(num_epochs=0), 'num_epochs=0 must be at least 1'),
    (dict(process_count=3), 'batch_size=8 is not divisible by process_count=3'),
    (dict(process_index=2, process_count=2), 'process_index=2 is not in 0..1'),
    (dict(seed=-1), 'seed=-1 is not in'),
    (dict(packing='worst_fit'), "packing 'worst_fit' is not one of best_fit"),
    (dict(documents=[]), '0 documents hold no tokens'),
  ],
)
def test_wrong_arguments_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    _dataset(**change)


def test_ids_beyond_the_vocabulary_are_refused():
  class Liar(ByteTokenizer):
    vocab_size = 100

  with pytest.raises(ValueError, match='vocab_size is 100'):
    data.make_dataset(['zz'], Liar(), seq_len=4, batch_size=1, seed=0)


def test_large_vocabularies_keep_their_ids():
  class Large:
    vocab_size = 300_000
    bos_id = eos_id = pad_id = None

    def encode(self, text, add_bos=False):
      return [65_535, 299_999, 0, 65_536]

  (batch,) = data.make_dataset(
    ['x'], Large(), seq_len=6, batch_size=1, seed=0, num_epochs=1
  )
  assert batch['tokens'].tolist() == [[65_535, 299_999, 0, 65_536, 0, 0]]
  assert batch['targets'].tolist() == [[299_999, 0, 65_536, 0, 0, 0]]
  assert batch['weights'].tolist() == [[1, 1, 1, 0, 0, 0]]
  assert batch['segment_ids'].tolist() == [[1, 1, 1, 1, 0, 0]]


def test_makes_far_more_than_200k_tokens_a_second_on_one_core():
  documents = ['some text of middling length ' * 20] * 500
  iterator = iter(_dataset(documents, seq_len=256, batch_size=16))
  next(iterator)
  start = time.process_time()  # Not the clock: the machine may be busy.
  tokens = sum(int((b['segment_ids'] > 0).sum()) for b in _take(iterator, 100))
  assert tokens / (time.process_time() - start) > 400_000
