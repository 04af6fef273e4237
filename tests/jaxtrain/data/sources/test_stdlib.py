"""The standard library gives megabytes of text, split without overlap."""

import json
import pathlib
import pydoc_data.topics
import sysconfig

import pytest

from jaxtrain import data

_LIBRARY = pathlib.Path(sysconfig.get_path('stdlib'))


@pytest.fixture(scope='module')
def splits():
  source = data.get('stdlib')
  return list(source()), list(source(split='validation'))


def test_is_megabytes_of_real_text(splits):
  train, held_out = splits
  assert sum(map(len, train)) > 8e6
  assert 2e5 < sum(map(len, held_out)) < 0.15 * sum(map(len, train))
  assert all(train) and all(held_out)


def test_holds_source_and_documentation(splits):
  documents = set(splits[0]) | set(splits[1])
  assert pathlib.Path(json.__file__).read_bytes().decode() in documents
  assert set(pydoc_data.topics.topics.values()) <= documents


def test_no_file_is_in_both_splits(splits):
  train, held_out = splits
  assert not set(train) & set(held_out)


def test_installed_packages_and_build_paths_are_left_out(splits):
  outside = ['site-packages', '_sysconfigdata*.py', 'config-*/*.py']
  documents = set(splits[0]) | set(splits[1])
  for pattern in outside:
    for path in list(_LIBRARY.glob(pattern))[:5]:
      if path.is_file():
        assert path.read_bytes().decode() not in documents
  assert not any(d.startswith('# system configuration gen') for d in documents)


def test_order_does_not_change(splits):
  assert list(data.get('stdlib')()) == splits[0]


def test_tests_can_be_left_out(splits):
  fewer = data.get('stdlib')(include_tests=False)
  assert set(fewer) <= set(splits[0])
  assert sum(map(len, fewer)) > 5e6


def test_wrong_arguments_are_named():
  with pytest.raises(ValueError, match="split 'dev' is not one of"):
    data.get('stdlib')(split='dev')
  with pytest.raises(ValueError, match='validation_fraction=2'):
    data.get('stdlib')(validation_fraction=2)
  with pytest.raises(ValueError, match='known: jsonl, stdlib, text'):
    data.get('wikipedia')
