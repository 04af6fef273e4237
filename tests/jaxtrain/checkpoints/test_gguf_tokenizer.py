"""Tokenizers out of GGUF files against the algorithms they stand for."""

import gguf
import hypothesis
from hypothesis import strategies as st
import pytest
import tokenizers

from jaxtrain.checkpoints.gguf_tokenizer import gguf_special_tokens
from jaxtrain.checkpoints.gguf_tokenizer import gguf_tokenizer
from jaxtrain.checkpoints.tokenizer import HFTokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6
_WORDS = 'a b c d _ ab bc abc _a _ab cd __a aa aaa bb ca d_'
_WORDS = _WORDS.replace('_', '\u2581').split(' ')
_SPECIAL = ['<pad>', '<eos>', '<bos>', '<unk>', '<end_of_turn>', '  ', '   ']
_TYPES = [_CONTROL] * 3 + [_UNKNOWN, _CONTROL, _USER, _USER]


def _write(path, tokens, types, model='llama', scores=None, **fields):
  writer = gguf.GGUFWriter(str(path), 'llama')
  writer.add_tokenizer_model(model)
  writer.add_token_list(tokens)
  writer.add_token_types(types)
  if scores:
    writer.add_token_scores(scores)
  for key, value in fields.items():
    if isinstance(value, bool):
      writer.add_bool(f'tokenizer.ggml.{key}', value)
    elif isinstance(value, int):
      writer.add_uint32(f'tokenizer.ggml.{key}', value)
    elif isinstance(value, str):
      writer.add_string(f'tokenizer.ggml.{key}', value)
    else:
      writer.add_array(f'tokenizer.ggml.{key}', value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  return path


def _sentencepiece_file(path, **fields):
  bytes_ = [f'<0x{i:02X}>' for i in range(256)]
  tokens = _SPECIAL + bytes_ + _WORDS
  types = _TYPES + [_BYTE] * 256 + [_NORMAL] * len(_WORDS)
  # Later words are worse, as in Gemma; the specials' scores mean nothing.
  first = len(_SPECIAL) + 256
  scores = [0.0] * first + [-float(i) for i in range(len(_WORDS))]
  ids = dict(
    bos_token_id=2, eos_token_id=1, padding_token_id=0, unknown_token_id=3
  )
  return tokens, _write(path, tokens, types, scores=scores, **ids, **fields)


def _sentencepiece(text, tokens, prefix):
  """SentencePiece BPE, https://arxiv.org/abs/1808.06226, section 3.1.

  User-defined pieces are cut out first, longest first; then, while any two
  neighbours join to a piece, the best such pair, leftmost if equal, is joined.
  """
  rank = {w: i for i, w in enumerate(_WORDS)}
  runs, i = [''], 0
  while i < len(text):
    cut = next((u for u in ('   ', '  ') if text.startswith(u, i)), None)
    if cut:
      runs += [cut, '']
      i += len(cut)
    else:
      runs[-1] += text[i]
      i += 1
  ids = []
  for number, run in enumerate(runs):
    if number % 2:
      ids.append(tokens.index(run))
      continue
    if prefix and run:
      run = ' ' + run
    parts = list(run.replace(' ', '\u2581'))
    while True:
      pairs = [
        (rank[a + b], at)
        for at, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
        if a + b in rank
      ]
      if not pairs:
        break
      at = min(pairs)[1]
      parts[at : at + 2] = [parts[at] + parts[at + 1]]
    for part in parts:
      if part in rank:
        ids.append(tokens.index(part))
      else:
        ids += [tokens.index(f'<0x{b:02X}>') for b in part.encode()]
  return ids


@pytest.fixture(scope='module', params=[False, True], ids=['plain', 'prefix'])
def sentencepiece(request, tmp_path_factory):
  path = tmp_path_factory.mktemp('gguf') / 'model.gguf'
  tokens, path = _sentencepiece_file(path, add_space_prefix=request.param)
  return request.param, tokens, gguf_tokenizer(path)


@hypothesis.given(text=st.text('abcd \né日', max_size=20))
def test_sentencepiece_ids(sentencepiece, text):
  prefix, tokens, tokenizer = sentencepiece
  got = tokenizer.encode(text, add_special_tokens=False).ids
  assert got == _sentencepiece(text, tokens, prefix)
  if not prefix:
    assert tokenizer.decode(got) == text


def test_bos_is_added_and_taken_off(sentencepiece):
  prefix, tokens, tokenizer = sentencepiece
  ids = tokenizer.encode('ab c').ids
  assert ids[0] == tokens.index('<bos>') == 2
  assert tokenizer.decode(ids) == 'ab c'
  control = tokenizer.encode('a<end_of_turn>', add_special_tokens=False).ids
  assert control[-1] == 4


def test_special_tokens_fit_our_tokenizer(tmp_path):
  _, path = _sentencepiece_file(tmp_path / 'model.gguf')
  special = gguf_special_tokens(path)
  assert special == dict(bos='<bos>', eos='<eos>', pad='<pad>', stop_ids=(1, 4))
  tokenizer = HFTokenizer(gguf_tokenizer(path), **special)
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 1, 0)
  assert tokenizer.encode('ab', add_bos=True)[0] == 2
  _, path = _sentencepiece_file(tmp_path / 'without', add_bos_token=False)
  assert gguf_special_tokens(path)['bos'] is None
  assert gguf_tokenizer(path).encode('a').ids[0] != 2


def _byte_level_file(path, pre, **fields):
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  merges = ['1 2', '12 3', '123 4', 'h e', 'Ġ he', 'l l']
  joined = [m.replace(' ', '') for m in merges]
  tokens = ['<|end|>', *alphabet, *joined, 'hello']
  types = [_CONTROL] + [_NORMAL] * (len(tokens) - 1)
  _write(path, tokens, types, model='gpt2', pre=pre, merges=merges, **fields)
  return gguf_tokenizer(path)


@pytest.mark.parametrize(
  'pre, numbers, word',
  [
    # Llama 3 cuts numbers by three and takes whole words that it has.
    ('llama-bpe', ['123', '4'], ['hello']),
    ('qwen2', ['1', '2', '3', '4'], ['he', 'll', 'o']),
    ('gpt-2', ['1234'], ['he', 'll', 'o']),
  ],
)
def test_byte_level_words(pre, numbers, word, tmp_path):
  tokenizer = _byte_level_file(tmp_path / 'model.gguf', pre)

  def tokens(text):
    return tokenizer.encode(text, add_special_tokens=False).tokens

  assert tokens('1234') == numbers
  assert tokens('hello') == word
  assert tokens('he he<|end|>') == ['he', 'Ġhe', '<|end|>']


@hypothesis.given(text=st.text(max_size=20))
def test_byte_level_holds_any_text(byte_level, text):
  ids = byte_level.encode(text, add_special_tokens=False).ids
  assert byte_level.decode(ids) == text


@pytest.fixture(scope='module')
def byte_level(tmp_path_factory):
  path = tmp_path_factory.mktemp('gguf') / 'model.gguf'
  return _byte_level_file(path, 'llama-bpe')


def test_unsupported_tokenizers_are_named(tmp_path):
  path = tmp_path / 'model.gguf'
  with pytest.raises(ValueError, match="pre='novel'.*allowed: gpt-2, llama-b"):
    _byte_level_file(path, 'novel')
  _write(path, ['a'], [_NORMAL], model='t5')
  with pytest.raises(ValueError, match="model='t5'.*allowed: llama, gpt2"):
    gguf_tokenizer(path)
  _write(path, ['a', 'b'], [_NORMAL])
  with pytest.raises(ValueError, match='1 token types for 2 tokens'):
    gguf_tokenizer(path)
  _write(path, ['a', 'b'], [_NORMAL] * 2)
  with pytest.raises(ValueError, match='tokenizer.ggml.scores does not fit'):
    gguf_tokenizer(path)
  with pytest.raises(ValueError, match='remove_extra_whitespaces'):
    _sentencepiece_file(path, remove_extra_whitespaces=True)
    gguf_tokenizer(path)
