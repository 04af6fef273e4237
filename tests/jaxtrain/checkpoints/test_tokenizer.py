"""Tokenizers round trip, and incremental text equals whole text."""

import json
import random

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import processors
from tokenizers import trainers

from jaxtrain.checkpoints.tokenizer import ByteTokenizer
from jaxtrain.checkpoints.tokenizer import HFTokenizer
from jaxtrain.checkpoints.tokenizer import IncrementalDecoder
from jaxtrain.checkpoints.tokenizer import Tokenizer
from jaxtrain.checkpoints.tokenizer import load_tokenizer

_TEXTS = [
  '',
  'a',
  'Hello, world',
  'naïve café',
  '世界',
  '👩‍🚀🚀 ok',
  'x\x00\n\ty',
]


def _byte_level_bpe():
  """As GPT-2, Llama 3 and Qwen: tokens may be parts of characters."""
  t = tokenizers.Tokenizer(models.BPE())
  t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  t.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=300,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=['<s>', '</s>', '<pad>'],
    show_progress=False,
  )
  t.train_from_iterator(['Hello world, hello café 世'] * 9, trainer)
  return t


def _sentencepiece_like():
  """As Llama 2: a space mark, the first one dropped, and byte fallback."""
  pieces = ['<unk>', '<s>', '</s>'] + [f'<0x{i:02X}>' for i in range(256)]
  pieces += ['▁', 'a', 'H', 'e', 'l', 'o', '▁H', 'el', 'lo']
  vocab = {p: i for i, p in enumerate(pieces)}
  merges = [('▁', 'H'), ('e', 'l'), ('l', 'o')]
  t = tokenizers.Tokenizer(
    models.BPE(vocab, merges, unk_token='<unk>', byte_fallback=True)
  )
  t.pre_tokenizer = pre_tokenizers.Metaspace()
  t.decoder = decoders.Sequence(
    [
      decoders.Replace('▁', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  t.add_special_tokens(['<s>', '</s>'])
  t.post_processor = processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', 1)]
  )
  return t


@pytest.fixture(params=['byte', 'bpe', 'sentencepiece'])
def tokenizer(request):
  if request.param == 'byte':
    return ByteTokenizer()
  if request.param == 'bpe':
    return HFTokenizer(_byte_level_bpe(), bos='<s>', eos='</s>', pad='<pad>')
  return HFTokenizer(_sentencepiece_like(), eos='</s>')


def test_follows_the_protocol(tokenizer):
  assert isinstance(tokenizer, Tokenizer)
  for i in (tokenizer.bos_id, tokenizer.eos_id, *tokenizer.stop_ids):
    assert 0 <= i < tokenizer.vocab_size
  assert tokenizer.eos_id in tokenizer.stop_ids


@pytest.mark.parametrize('text', _TEXTS)
def test_round_trip(tokenizer, text):
  ids = tokenizer.encode(text)
  assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
  assert tokenizer.decode(ids) == text
  assert tokenizer.decode(np.array(ids, np.int32)) == text
  assert tokenizer.encode(text, add_bos=True) == [tokenizer.bos_id, *ids]


def test_special_ids_leave_no_text(tokenizer):
  ids = [tokenizer.bos_id, *tokenizer.encode('He'), tokenizer.eos_id]
  assert tokenizer.decode(ids) == 'He'
  assert tokenizer.decode([*ids, tokenizer.vocab_size + 5, -1]) == 'He'


def test_batch_equals_one_by_one(tokenizer):
  for text, ids in zip(_TEXTS, tokenizer.encode_batch(_TEXTS), strict=True):
    assert ids.tolist() == tokenizer.encode(text)


def test_byte_ids_are_the_utf8_bytes():
  assert ByteTokenizer().encode('é') == [0xC3, 0xA9]
  assert ByteTokenizer().decode([0xC3]) == '\ufffd'


def test_lone_surrogates_become_question_marks(tokenizer):
  ids = tokenizer.encode('a\ud800a')
  assert tokenizer.decode(ids) == 'a?a'
  assert tokenizer.encode_batch(['a\ud800a'])[0].tolist() == ids


@pytest.mark.parametrize('text', _TEXTS + [' '.join(_TEXTS[1:]) * 3])
def test_pieces_join_to_the_whole_text(tokenizer, text):
  decoder = IncrementalDecoder(tokenizer)
  pieces = [decoder.push(i) for i in tokenizer.encode(text, add_bos=True)]
  assert all('\ufffd' not in p for p in pieces)
  assert ''.join(pieces) + decoder.flush() == text


def test_pieces_come_as_soon_as_they_are_whole():
  decoder = IncrementalDecoder(ByteTokenizer())
  pieces = [decoder.push(i) for i in 'aé世'.encode()]
  assert pieces == ['a', '', 'é', '', '', '世']


def test_broken_bytes_come_out_as_in_one_decode():
  rng = random.Random(0)
  tokenizer = ByteTokenizer()
  for _ in range(50):
    ids = [rng.choice([0x41, 0x80, 0xC3, 0xE4, 0xF0, 257]) for _ in range(20)]
    decoder = IncrementalDecoder(tokenizer)
    text = ''.join(decoder.push(i) for i in ids) + decoder.flush()
    assert text == tokenizer.decode(ids)


def test_broken_bytes_are_not_held_for_ever():
  tokenizer = HFTokenizer(_byte_level_bpe())
  (half,) = set(tokenizer.encode('é')[:1])
  decoder = IncrementalDecoder(tokenizer)
  pieces = [decoder.push(half) for _ in range(100)]
  assert sum(map(len, pieces)) >= 80
  assert len(decoder._ids) < 40


def _directory(tmp_path, tokenizer, **files):
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  for name, value in files.items():
    (tmp_path / f'{name}.json').write_text(json.dumps(value))
  return tmp_path


def test_loads_by_name_file_and_directory(tmp_path):
  assert isinstance(load_tokenizer('byte'), ByteTokenizer)
  path = _directory(
    tmp_path,
    _sentencepiece_like(),
    tokenizer_config={'eos_token': {'content': '</s>'}, 'pad_token': None},
    special_tokens_map={'pad_token': '<unk>'},
    generation_config={'eos_token_id': [2, 5]},
  )
  for spec in (path, str(path), path / 'tokenizer.json'):
    t = load_tokenizer(spec)
    assert (t.bos_id, t.eos_id, t.pad_id) == (1, 2, 0)
    assert t.stop_ids == (2, 5)
    assert t.vocab_size == 268


def test_bos_only_where_the_model_was_trained_with_it(tmp_path):
  config = {'bos_token': '<s>', 'eos_token': '</s>'}
  path = _directory(tmp_path, _byte_level_bpe(), tokenizer_config=config)
  assert load_tokenizer(path).bos_id is None
  config['add_bos_token'] = True
  path = _directory(tmp_path, _byte_level_bpe(), tokenizer_config=config)
  assert load_tokenizer(path).bos_id == 0


def test_eos_may_come_from_the_generation_config_alone(tmp_path):
  files = dict(generation_config={'eos_token_id': 1})
  t = load_tokenizer(_directory(tmp_path, _byte_level_bpe(), **files))
  assert t.eos_id == 1 and t.stop_ids == (1,)


def test_errors_name_what_was_given(tmp_path):
  with pytest.raises(ValueError, match='no tokenizer at .*nowhere'):
    load_tokenizer(tmp_path / 'nowhere')
  with pytest.raises(ValueError, match='no tokenizer at'):
    load_tokenizer(tmp_path)
  broken = tmp_path / 'tokenizer.json'
  broken.write_text('{"model": 3}')
  with pytest.raises(ValueError, match='tokenizer.json is not a tokenizer'):
    load_tokenizer(broken)
  with pytest.raises(ValueError, match="no token '<eot>'"):
    HFTokenizer(_byte_level_bpe(), eos='<eot>')
  path = _directory(tmp_path, _byte_level_bpe())
  (path / 'generation_config.json').write_text('{')
  with pytest.raises(ValueError, match='generation_config.json is not JSON'):
    load_tokenizer(path)


def test_its_json_is_the_same_tokenizer():
  first = HFTokenizer(_byte_level_bpe(), eos='</s>')
  again = tokenizers.Tokenizer.from_str(first.to_json())
  again = HFTokenizer(again, eos='</s>')
  for text in _TEXTS:
    assert again.encode(text) == first.encode(text)
