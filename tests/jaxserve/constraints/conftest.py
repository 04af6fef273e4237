"""Tokenizers of the three kinds, small, with tokens that end in a character."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import trainers

from jaxtrain.checkpoints.tokenizer import ByteTokenizer
from jaxtrain.checkpoints.tokenizer import HFTokenizer

_TEXT = ['{"name": "José", "n": 12, "ok": true}', 'été 世界 ☃☃', 'aé世 a"b'] * 9
_SPECIAL = ['<s>', '</s>', '<|end|>']


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """A tokenizer, and the bytes of each token; special ones have none."""

  tokenizer: Any
  bytes: list

  @property
  def size(self):
    """Of a model that has some more, and no whole number of words."""
    return len(self.bytes) + 13

  def text(self, ids):
    return b''.join(self.bytes[i] for i in ids).decode()

  def allowed(self, mask):
    """Token numbers, as a set."""
    assert mask.dtype == np.uint32
    assert mask.shape == (-(-self.size // 32),)
    bits = np.unpackbits(mask.view(np.uint8), bitorder='little')
    return set(np.flatnonzero(bits).tolist())


def _byte():
  return Vocabulary(
    ByteTokenizer(), [bytes([i]) for i in range(256)] + [None] * 8
  )


def _byte_level():
  t = tokenizers.Tokenizer(models.BPE())
  t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  t.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=360,
    special_tokens=_SPECIAL,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  t.train_from_iterator(_TEXT, trainer)
  # GPT-2's printable bytes stand for themselves, the others for 256 onwards.
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in printable]
  byte_of = {chr(b): b for b in printable}
  byte_of |= {chr(256 + i): b for i, b in enumerate(others)}
  made = HFTokenizer(t, eos='</s>', stop_ids=[t.token_to_id('<|end|>')])
  return _hugging_face(made, t, lambda x: bytes(byte_of[c] for c in x))


def _byte_fallback():
  """As of Llama 2: SentencePiece's."""
  pieces = [f'<0x{b:02X}>' for b in range(256)]
  words = ['▁', 'a', 'b', '"', '▁"', '{"', '":', 'é', 'aé', '世', '1', '▁a"']
  vocab = {p: i for i, p in enumerate([*_SPECIAL, *pieces, *words])}
  t = tokenizers.Tokenizer(
    models.BPE(vocab, [], unk_token='<s>', byte_fallback=True)
  )
  t.normalizer = normalizers.Replace(' ', '▁')
  t.decoder = decoders.Sequence(
    [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
  )
  t.add_special_tokens(_SPECIAL)

  def to_bytes(piece):
    if piece in pieces:
      return bytes([pieces.index(piece)])
    return piece.replace('▁', ' ').encode()

  return _hugging_face(HFTokenizer(t, eos='</s>'), t, to_bytes)


def _hugging_face(made, t, to_bytes):
  tokens = [t.id_to_token(i) for i in range(made.vocab_size)]
  return Vocabulary(
    made, [None if x in _SPECIAL else to_bytes(x) for x in tokens]
  )


_MAKE = dict(byte=_byte, byte_level=_byte_level, byte_fallback=_byte_fallback)


@pytest.fixture(scope='session', params=[*_MAKE])
def vocabulary(request):
  return _MAKE[request.param]()
