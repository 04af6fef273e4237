"""Tokenizers: text to ids and back, alike in training and in serving.

Two kinds. `ByteTokenizer` needs no file: ids 0..255 are the UTF-8 bytes.
`HFTokenizer` runs any Hugging Face `tokenizer.json` through the `tokenizers`
library, which is imported only then.
"""

import codecs
from collections.abc import Sequence
import json
import os
import pathlib
from typing import Any, Protocol, runtime_checkable

import numpy as np

_REPLACEMENT = '\ufffd'  # What undecodable bytes become.


@runtime_checkable
class Tokenizer(Protocol):
  """What training and serving need of a tokenizer.

  A tokenizer may also have `encode_batch(texts) -> list of integer arrays`,
  used where many documents are tokenized.

  Attributes:
    vocab_size: Every id is below it.
    bos_id: Starts a document, or `None` if the model was trained without.
    eos_id: Ends a document, or `None`.
    pad_id: Fills rows, or `None`; never read.
    stop_ids: All ids that end a generation, `eos_id` among them.
  """

  vocab_size: int
  bos_id: int | None
  eos_id: int | None
  pad_id: int | None
  stop_ids: tuple[int, ...]

  def encode(self, text: str, add_bos: bool = False) -> list[int]:
    """Ids of `text`, after `bos_id` if asked for and there is one."""
    ...

  def decode(self, ids: Sequence[int]) -> str:
    """Text of `ids`; special tokens leave none, bad bytes leave U+FFFD."""
    ...


class ByteTokenizer:
  """UTF-8 bytes as ids 0..255, then bos 256, eos 257 and pad 258.

  `vocab_size` is 264: five ids are never used, so that 2, 4 or 8 tensor shards
  divide the vocabulary.
  """

  vocab_size: int = 264
  bos_id: int = 256
  eos_id: int = 257
  pad_id: int = 258
  stop_ids: tuple[int, ...] = (257,)

  def encode(self, text: str, add_bos: bool = False) -> list[int]:
    """Bytes of `text` as ids."""
    ids = list(_to_bytes(text))
    return [self.bos_id] + ids if add_bos else ids

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Bytes of each text, uint8."""
    return [np.frombuffer(_to_bytes(t), np.uint8) for t in texts]

  def decode(self, ids: Sequence[int]) -> str:
    """Text of the bytes among `ids`; other ids leave none."""
    return bytes(i for i in ids if 0 <= i < 256).decode('utf-8', 'replace')

  def __repr__(self) -> str:
    return 'ByteTokenizer()'


class HFTokenizer:
  """A Hugging Face `tokenizer.json`.

  Args:
    file: Path of the file, or a `tokenizers.Tokenizer`.
    bos: Token (not id) that starts a document. By default the one that the
      file's own post-processor puts in front, or none.
    eos: Token that ends a document.
    pad: Token that fills rows.
    stop_ids: Ids that end a generation besides that of `eos`.

  Raises:
    ValueError: The file is missing or unreadable, or a token is not in it.
  """

  def __init__(
    self,
    file: str | os.PathLike | Any,
    *,
    bos: str | None = None,
    eos: str | None = None,
    pad: str | None = None,
    stop_ids: Sequence[int] = (),
  ):
    self._tokenizer = _read_tokenizer(file)
    self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
    self.bos_id = self._prepended() if bos is None else self._id(bos)
    self.eos_id = None if eos is None else self._id(eos)
    self.pad_id = None if pad is None else self._id(pad)
    own = () if self.eos_id is None else (self.eos_id,)
    self.stop_ids = tuple(dict.fromkeys((*own, *map(int, stop_ids))))

  def encode(self, text: str, add_bos: bool = False) -> list[int]:
    """Ids of `text`, without what the file's post-processor would add."""
    text = _to_bytes(text).decode()
    ids = self._tokenizer.encode(text, add_special_tokens=False).ids
    return [self.bos_id] + ids if add_bos and self.bos_id is not None else ids

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of each text, int32, on all cores."""
    encoded = self._tokenizer.encode_batch_fast(
      [_to_bytes(t).decode() for t in texts], add_special_tokens=False
    )
    return [np.asarray(e.ids, np.int32) for e in encoded]

  def decode(self, ids: Sequence[int]) -> str:
    """Text of `ids`; special and unknown ids leave none."""
    return self._tokenizer.decode([int(i) for i in ids if i >= 0])

  def to_json(self) -> str:
    """The text of its `tokenizer.json`."""
    return self._tokenizer.to_str()

  def __repr__(self) -> str:
    return f'HFTokenizer(vocab_size={self.vocab_size})'

  def _id(self, token):
    if (i := self._tokenizer.token_to_id(token)) is None:
      raise ValueError(f'the tokenizer has no token {token!r}')
    return i

  def _prepended(self):
    plain = self._tokenizer.encode('a', add_special_tokens=False).ids
    full = self._tokenizer.encode('a', add_special_tokens=True).ids
    return full[0] if full and full[:1] != plain[:1] else None


def load_tokenizer(spec: str | os.PathLike) -> Tokenizer:
  """Makes a tokenizer from its name or files.

  Args:
    spec: 'byte'; a `tokenizer.json`; or a directory that holds one. Which
      tokens start, end and pad is read from `tokenizer_config.json`,
      `special_tokens_map.json` and `generation_config.json` beside it.

  Returns:
    The tokenizer.

  Raises:
    ValueError: There is no such file, or it cannot be read.
  """
  if str(spec) == 'byte':
    return ByteTokenizer()
  path = pathlib.Path(spec)
  path = path / 'tokenizer.json' if path.is_dir() else path
  if not path.is_file():
    raise ValueError(
      f'no tokenizer at {str(spec)!r}: give "byte", a tokenizer.json, or a '
      'directory with a tokenizer.json'
    )
  special = _read_json(path.with_name('special_tokens_map.json'))
  config = special | _read_json(path.with_name('tokenizer_config.json'))
  stops = _read_json(path.with_name('generation_config.json')).get(
    'eos_token_id'
  )
  stops = [stops] if isinstance(stops, int) else stops or []
  tokenizer = HFTokenizer(
    path,
    eos=_token(config.get('eos_token')),
    pad=_token(config.get('pad_token')),
    stop_ids=stops,
  )
  # A model whose tokenizer puts nothing in front was trained without, unless
  # the (older, slow) configuration says that its code did.
  if tokenizer.bos_id is None and config.get('add_bos_token'):
    bos = _token(config.get('bos_token'))
    tokenizer.bos_id = None if bos is None else tokenizer._id(bos)
  if tokenizer.eos_id is None and stops:
    tokenizer.eos_id = stops[0]
  return tokenizer


class IncrementalDecoder:
  """Text of a growing sequence, piece by piece, never half a character.

  The pieces and the final `flush` join to `tokenizer.decode` of all the ids,
  as long as these are valid UTF-8.
  """

  # Tokens held back for the rest of a character. One character has at most
  # four bytes; beyond this the bytes are not text and are given up.
  _MAX_HELD = 16

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    # Bytes need no look-back, and broken ones come out exactly as from decode.
    is_bytes = isinstance(tokenizer, ByteTokenizer)
    self._bytes = (
      codecs.getincrementaldecoder('utf-8')('replace') if is_bytes else None
    )
    self._ids: list[int] = []  # The last piece's, then those held back.
    self._num_done = 0  # How many of them are the last piece's.

  def push(self, token: int) -> str:
    """Adds one id and returns the text that is now certain, maybe none."""
    if self._bytes is not None:
      return self._bytes.decode(bytes([token]) if 0 <= token < 256 else b'')
    self._ids.append(int(token))
    new = self._new_text()
    held = len(self._ids) - self._num_done
    unsure = not new or new.endswith(_REPLACEMENT)
    return '' if unsure and held < self._MAX_HELD else self._emit(new)

  def flush(self) -> str:
    """Returns what is still held back; the sequence has ended."""
    if self._bytes is not None:
      return self._bytes.decode(b'', final=True)
    return self._emit(self._new_text())

  def _new_text(self):
    # Decoding with the last piece in front keeps what depends on the left
    # neighbour (the space that SentencePiece drops at the start of a text).
    before = self._tokenizer.decode(self._ids[: self._num_done])
    return self._tokenizer.decode(self._ids)[len(before) :]

  def _emit(self, text):
    self._ids = self._ids[self._num_done :]
    self._num_done = len(self._ids)
    return text


def _to_bytes(text):
  # Lone surrogates, which JSON may hold but UTF-8 cannot, become '?'.
  return text.encode('utf-8', 'replace')


def _read_tokenizer(file):
  import tokenizers

  if isinstance(file, tokenizers.Tokenizer):
    return file
  if not os.path.isfile(file):
    raise ValueError(f'no tokenizer file {str(file)!r}')
  try:
    return tokenizers.Tokenizer.from_file(str(file))
  except Exception as e:  # The library raises plain Exception.
    raise ValueError(f'{file} is not a tokenizer.json: {e}') from e


def _read_json(path):
  if not path.is_file():
    return {}
  try:
    value = json.loads(path.read_text('utf-8'))
  except ValueError as e:
    raise ValueError(f'{path} is not JSON: {e}') from e
  return {k: v for k, v in value.items() if v is not None}


def _token(value):
  return value.get('content') if isinstance(value, dict) else value
