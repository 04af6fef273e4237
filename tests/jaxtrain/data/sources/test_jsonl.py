"""JSON lines become documents; a bad line is named by file and number."""

import json

import pytest

from jaxtrain import data


def _write(path, *lines):
  path.write_bytes('\n'.join(lines).encode())
  return path


def test_reads_the_text_of_each_line(tmp_path):
  texts = ['one', 'zwei é\nlines', '', '\u2028 三']
  a = _write(tmp_path / 'a.jsonl', *(json.dumps({'t': x}) for x in texts))
  plain = json.dumps({'t': '三', 'n': 1}, ensure_ascii=False)
  b = _write(tmp_path / 'b.jsonl', '', plain, '   ', '{"t": "last"}', '')
  documents = data.get('jsonl')([a, b], text_key='t')
  assert list(documents) == ['one', 'zwei é\nlines', '\u2028 三', '三', 'last']
  assert documents[4] == 'last'


def test_splits_are_disjoint_and_complete(tmp_path):
  texts = [f'document {i}' for i in range(300)]
  path = _write(tmp_path / 'a.jsonl', *(json.dumps({'text': x}) for x in texts))
  kwargs = dict(files=path, validation_fraction=0.2)
  train = list(data.get('jsonl')(**kwargs))
  held_out = list(data.get('jsonl')(split='validation', **kwargs))
  assert sorted(train + held_out) == sorted(texts)
  assert 30 < len(held_out) < 90


@pytest.mark.parametrize(
  'line, message',
  [
    ('{"text": "cut off', 'a.jsonl:3: not JSON'),
    ('["text"]', 'a.jsonl:3: not a JSON object'),
    ('{"body": "x", "id": 3}', "a.jsonl:3: no key 'text'; it has 'body', 'id'"),
    ('{}', "a.jsonl:3: no key 'text'; it has none"),
    ('{"text": 3}', "a.jsonl:3: 'text' is not a string"),
    ('{"text": "\udcff"}', 'a.jsonl:3: not JSON'),
  ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
  path = tmp_path / 'a.jsonl'
  lines = ['{"text": "ok"}', '', line, '{"text": "ok"}']
  path.write_bytes('\n'.join(lines).encode('utf-8', 'surrogateescape'))
  with pytest.raises(ValueError, match=message):
    data.get('jsonl')(path)


def test_missing_files_and_empty_ones_are_named(tmp_path):
  with pytest.raises(ValueError, match='no file matches'):
    data.get('jsonl')(f'{tmp_path}/*.jsonl')
  path = _write(tmp_path / 'a.jsonl', '{"text": ""}')
  with pytest.raises(ValueError, match="no document in split 'train' of 1"):
    data.get('jsonl')(path)
