"""Text files are read whole or cut at separators; the rest is refused."""

import pickle

import pytest

from jaxtrain import data


def _write(folder, **files):
  for name, content in files.items():
    content = content.encode() if isinstance(content, str) else content
    (folder / f'{name}.txt').write_bytes(content)
  return folder


def test_a_file_is_a_document_in_order_of_names(tmp_path):
  _write(tmp_path, b='zwei\r\n', a='eins é', c='')
  documents = data.get('text')(str(tmp_path / '*.txt'))
  assert list(documents) == ['eins é', 'zwei\r\n']
  assert documents[-1] == 'zwei\r\n'
  assert list(pickle.loads(pickle.dumps(documents))) == list(documents)


def test_paths_and_globs_mix_without_repeats(tmp_path):
  (tmp_path / 'deep').mkdir()
  _write(tmp_path / 'deep', b='2')
  _write(tmp_path, a='1', **{'[x]': '3'})
  files = [tmp_path / '[x].txt', f'{tmp_path}/**/*.txt', tmp_path / 'a.txt']
  assert list(data.get('text')(files)) == ['3', '1', '2']


def test_separator_cuts_documents(tmp_path):
  _write(tmp_path, a='one<|e|>two<|e|><|e|>né<|e|>', b='<|e|>four')
  documents = data.get('text')(f'{tmp_path}/*.txt', separator='<|e|>')
  assert list(documents) == ['one', 'two', 'né', 'four']


def test_splits_are_disjoint_and_complete(tmp_path):
  pieces = [f'document {i % 300}' for i in range(400)]
  _write(tmp_path, a='|'.join(pieces))
  kwargs = dict(
    files=tmp_path / 'a.txt', separator='|', validation_fraction=0.2
  )
  train = list(data.get('text')(**kwargs))
  held_out = list(data.get('text')(split='validation', **kwargs))
  assert sorted(train + held_out) == sorted(pieces)
  assert not set(train) & set(held_out)  # Also not through equal documents.
  assert 0.1 < len(held_out) / len(pieces) < 0.3


@pytest.mark.parametrize(
  'kwargs, message',
  [
    (dict(files='{}/none.txt'), "no file '.*none.txt'"),
    (dict(files='{}/*.md'), "no file matches '.*md'"),
    (dict(files=[]), 'files is empty'),
    (dict(files='{}'), 'is a directory; give a glob such as'),
    (dict(files='{}/latin.txt'), 'latin.txt is not UTF-8 text: .*position 1'),
    (dict(files='{}/empty.txt'), "no document in split 'train' of 1 text"),
    (dict(files='{}/a.txt', separator=''), 'separator is empty'),
    (dict(files='{}/a.txt', split='test'), "split 'test' is not one of train"),
    (dict(files='{}/a.txt', split='validation'), 'holds out nothing'),
    (dict(files='{}/a.txt', validation_fraction=1.0), r'not in \[0, 1\)'),
  ],
)
def test_wrong_input_is_named(tmp_path, kwargs, message):
  _write(tmp_path, a='a', latin=b'x\xe9', empty='')
  if isinstance(kwargs['files'], str):
    kwargs = {**kwargs, 'files': kwargs['files'].format(tmp_path)}
  with pytest.raises(ValueError, match=message):
    data.get('text')(**kwargs)
