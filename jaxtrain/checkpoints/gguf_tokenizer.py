"""The tokenizer inside a GGUF file, for the `tokenizers` library.

Two kinds. 'llama' is SentencePiece BPE (https://arxiv.org/abs/1808.06226): a
pair is joined if the result is in the vocabulary, best score first, and bytes
stand in for unknown characters; the merges, which the file does not list, are
all splits of its tokens. 'gpt2' is byte-level BPE with listed merges.
"""

import os
from typing import Any

from jaxtrain.checkpoints.gguf_file import GGUFFile
from jaxtrain.checkpoints.gguf_file import open_gguf

# Values of tokenizer.ggml.token_type.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_SPACE = '\u2581'
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_LLAMA_3 = _WORDS.replace('NUMBERS', r'\p{N}{1,3}')
_QWEN_2 = _WORDS.replace('NUMBERS', r'\p{N}')
# tokenizer.ggml.pre -> expression that cuts text into words; `None` is GPT-2's.
_PRE = {
  'gpt-2': None,
  'llama-bpe': _LLAMA_3,
  'llama-v3': _LLAMA_3,
  'llama3': _LLAMA_3,
  'qwen2': _QWEN_2,
  'deepseek-r1-qwen': _QWEN_2,
}
# Control tokens that end a turn, where the metadata do not say so.
_END_OF_TURN = ('<end_of_turn>', '<|eot_id|>', '<|im_end|>', '<|endoftext|>')


def gguf_tokenizer(path: str | os.PathLike) -> Any:
  """Builds the `tokenizers.Tokenizer` of a GGUF file.

  `encode(text)` adds the tokens that the file says start and end a text;
  `encode(text, add_special_tokens=False)` does not.

  Raises:
    ValueError: The file has no tokenizer, or one of an unknown kind.
  """
  file = open_gguf(path)
  model = file.get('tokenizer.ggml.model')
  if model == 'llama':
    tokenizer = _sentencepiece(file)
  elif model == 'gpt2':
    tokenizer = _byte_level(file)
  else:
    raise ValueError(
      f'{path}: tokenizer.ggml.model={model!r} is not supported; allowed: '
      'llama, gpt2'
    )
  _add_tokens(tokenizer, file)
  _add_template(tokenizer, file)
  return tokenizer


def gguf_special_tokens(path: str | os.PathLike) -> dict[str, Any]:
  """Tokens with a role: `bos`, `eos`, `pad` and the ids `stop_ids`.

  Returns:
    Keyword arguments of `jaxtrain.checkpoints.tokenizer.HFTokenizer`: tokens,
    not ids, `None` where there is none; `stop_ids` end a generation.
  """
  file = open_gguf(path)
  tokens, types = _vocabulary(file)
  ids = {
    role: file.get(f'tokenizer.ggml.{role}_token_id')
    for role in ('bos', 'eos', 'padding', 'eot', 'eom')
  }
  named = {
    i: token
    for i, token in enumerate(tokens)
    if types[i] == _CONTROL and token in _END_OF_TURN
  }
  stops = [ids['eos'], ids['eot'], ids['eom'], *named]
  token_of = {role: None if i is None else tokens[i] for role, i in ids.items()}
  return dict(
    bos=token_of['bos'] if _adds(file, 'bos') else None,
    eos=token_of['eos'],
    pad=token_of['padding'],
    stop_ids=tuple(dict.fromkeys(i for i in stops if i is not None)),
  )


def _vocabulary(file):
  tokens = file.get('tokenizer.ggml.tokens')
  if not tokens:
    raise ValueError(f'{file.where} has no tokenizer.ggml.tokens')
  types = file.get('tokenizer.ggml.token_type')
  types = [_NORMAL] * len(tokens) if types is None else types.tolist()
  if len(types) != len(tokens):
    raise ValueError(
      f'{file.where}: {len(types)} token types for {len(tokens)} tokens'
    )
  return tokens, types


def _sentencepiece(file: GGUFFile) -> Any:
  import tokenizers
  from tokenizers import decoders
  from tokenizers import models
  from tokenizers import normalizers

  if file.get('tokenizer.ggml.remove_extra_whitespaces', False):
    raise ValueError(
      f'{file.where}: tokenizer.ggml.remove_extra_whitespaces is not supported'
    )
  tokens, types = _vocabulary(file)
  scores = file.get('tokenizer.ggml.scores')
  if scores is None or len(scores) != len(tokens):
    raise ValueError(f'{file.where}: tokenizer.ggml.scores does not fit')
  vocab = {token: i for i, token in enumerate(tokens)}
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocab=vocab,
      merges=_merges(tokens, types, scores.tolist()),
      unk_token=tokens[file.get('tokenizer.ggml.unknown_token_id', 0)],
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  to_space = normalizers.Replace(' ', _SPACE)
  from_space = [
    decoders.Replace(_SPACE, ' '),
    decoders.ByteFallback(),
    decoders.Fuse(),
  ]
  if file.get('tokenizer.ggml.add_space_prefix', True):
    to_space = normalizers.Sequence([normalizers.Prepend(_SPACE), to_space])
    from_space.append(decoders.Strip(' ', 1, 0))
  tokenizer.normalizer = to_space
  tokenizer.decoder = decoders.Sequence(from_space)
  return tokenizer


def _merges(tokens, types, scores):
  """All pairs of pieces that join to a piece, best score first."""
  pieces = {
    t: s for t, s, k in zip(tokens, scores, types, strict=True) if k == _NORMAL
  }
  pairs = []
  for piece, score in pieces.items():
    for i in range(1, len(piece)):
      if piece[:i] in pieces and piece[i:] in pieces:
        pairs.append((-score, -i, piece[:i], piece[i:]))
  pairs.sort(key=lambda p: p[:2])
  return [(left, right) for _, _, left, right in pairs]


def _byte_level(file: GGUFFile) -> Any:
  import tokenizers
  from tokenizers import decoders
  from tokenizers import models
  from tokenizers import normalizers
  from tokenizers import pre_tokenizers

  tokens, _ = _vocabulary(file)
  pre = file.get('tokenizer.ggml.pre')
  if pre not in _PRE:
    raise ValueError(
      f'{file.where}: tokenizer.ggml.pre={pre!r} is not supported; allowed: '
      f'{", ".join(_PRE)}'
    )
  merges = [tuple(m.split(' ', 1)) for m in file.get('tokenizer.ggml.merges')]
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocab={token: i for i, token in enumerate(tokens)},
      merges=merges,
      # Llama 3 takes a word that is in the vocabulary as it is.
      ignore_merges=_PRE[pre] == _LLAMA_3,
    )
  )
  if _PRE[pre] == _QWEN_2:
    tokenizer.normalizer = normalizers.NFC()
  if _PRE[pre] is None:
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
  else:
    words = tokenizers.Regex(_PRE[pre])
    cut = pre_tokenizers.Sequence(
      [
        pre_tokenizers.Split(words, behavior='isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
      ]
    )
  tokenizer.pre_tokenizer = cut
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def _add_tokens(tokenizer, file):
  """Tokens that are found in the text before anything else, longest first."""
  from tokenizers import AddedToken

  tokens, types = _vocabulary(file)
  added = [(t, k) for t, k in zip(tokens, types, strict=True) if t]
  tokenizer.add_special_tokens(
    [AddedToken(t, normalized=False) for t, k in added if k == _CONTROL]
  )
  tokenizer.add_tokens(
    [AddedToken(t, normalized=False) for t, k in added if k == _USER_DEFINED]
  )


def _add_template(tokenizer, file):
  from tokenizers import processors

  tokens, _ = _vocabulary(file)
  template, special = ['$A'], []
  for role in ('bos', 'eos'):
    i = file.get(f'tokenizer.ggml.{role}_token_id')
    if i is not None and _adds(file, role):
      template.insert(0 if role == 'bos' else len(template), tokens[i])
      special.append((tokens[i], i))
  if special:
    tokenizer.post_processor = processors.TemplateProcessing(
      single=template, special_tokens=special
    )


def _adds(file, role):
  default = role == 'bos' and (
    file.get('tokenizer.ggml.model') == 'llama'
    or _PRE.get(file.get('tokenizer.ggml.pre')) == _LLAMA_3
  )
  return bool(file.get(f'tokenizer.ggml.add_{role}_token', default))
