"""What is compiled when, and that nothing is compiled later."""

import dataclasses
import threading

import jax
import numpy as np
import pytest

from jaxserve.engine import programs as programs_lib
from jaxserve.engine.programs import NoCompiles
from jaxserve.engine.programs import Programs
from jaxserve.engine.programs import use_compilation_cache

_TIMEOUT_S = 60


class _Lowered:
  """Compiles to its name, once it may."""

  def __init__(self, name, may=None, error=None):
    self.name, self.may, self.error = name, may, error

  def compile(self):
    if self.may is not None:
      assert self.may.wait(_TIMEOUT_S)
    if self.error:
      raise self.error
    return self.name


def test_the_first_are_waited_for_and_the_others_follow():
  may, traced = threading.Event(), []

  def lower(name, **kwargs):
    traced.append((name, threading.get_ident()))
    return _Lowered(name, **kwargs)

  programs = Programs(
    {
      'small': lambda: lower('small'),
      'large': lambda: lower('large', may=may),
      'huge': lambda: lower('huge', may=may),
    },
    first=['small'],
  )
  # Traced by the caller, whose settings programs must have.
  assert traced == [(n, threading.get_ident()) for n in programs._compiled]
  assert programs.is_ready('small') and programs['small'] == 'small'
  assert not programs.is_ready('large') and not programs.is_ready('huge')
  assert programs.seconds.keys() == {'small'}
  may.set()
  programs.wait()
  assert programs.is_ready('large') and programs['huge'] == 'huge'
  assert programs.seconds.keys() == {'small', 'large', 'huge'}


def test_a_failure_is_raised_or_warned_of():
  bad = lambda: _Lowered('bad', error=ValueError('too large'))
  with pytest.raises(ValueError, match='too large'):
    Programs({'good': lambda: _Lowered('good'), 'bad': bad})
  may = threading.Event()
  late = lambda: _Lowered('late', may=may, error=ValueError('too late'))
  programs = Programs(
    {'good': lambda: _Lowered('good'), 'late': late}, ['good']
  )
  with pytest.warns(UserWarning, match='late is not compiled: too late'):
    may.set()
    with pytest.raises(ValueError, match='too late'):
      programs.wait()
    programs._pool.shutdown()
  assert not programs.is_ready('late') and programs.is_ready('good')


def test_serves_while_larger_buckets_compile(
  tiny, small_engine, make_driver, monkeypatch
):
  may = threading.Event()
  compile_ = Programs._compile

  def gated(self, name, *args):
    if name == 'step 24':
      assert may.wait(_TIMEOUT_S)
    return compile_(self, name, *args)

  monkeypatch.setattr(programs_lib.Programs, '_compile', gated)
  config = dataclasses.replace(small_engine, background_compile=True)
  runner = tiny.runner(config)
  try:
    driver = make_driver(runner, config.page_size)
    assert runner.max_ready_tokens == 4
    assert 'step 24' not in runner.compile_seconds
    with pytest.raises(
      ValueError, match='5 tokens is compiled.* largest has 4'
    ):
      runner.layout_for(5)
    prompt = [5, 9, 2, 11, 7, 1]
    driver.step({1: (0, prompt[:4])})
    expected = tiny.greedy(prompt, 3)
    assert driver.decode({1: (4, prompt[4:])}, 3)[1] == expected
  finally:
    may.set()
  runner.wait_until_ready()
  assert runner.max_ready_tokens == 24 and runner.layout_for(5).num_tokens == 24
  assert driver.decode({2: (0, prompt)}, 3)[2] == expected
  assert all(s > 0 for s in runner.compile_seconds.values())
  assert {'step 4', 'step 24', 'set_row'} <= runner.compile_seconds.keys()
  assert runner.num_late_compiles == 0


def _compile_something(x=[0.0]):  # noqa: B006
  x[0] += 1
  return jax.jit(lambda y: y + x[0])(np.float32(1))


def test_late_compilations_are_counted_in_their_thread():
  watch = NoCompiles()
  with watch:
    before = watch.count
    _compile_something()
    assert watch.count > before
    count = watch.count
    other = threading.Thread(target=_compile_something)
    other.start()
    other.join()
    assert watch.count == count
  _compile_something()
  assert watch.count == count


def test_strict_raises_where_it_happens():
  with NoCompiles(strict=True) as watch:
    with pytest.raises(RuntimeError, match='compiled while serving'):
      _compile_something()
  assert watch.count == 1
  _compile_something()


@pytest.fixture
def restored_cache():
  names = [
    'jax_compilation_cache_dir',
    'jax_persistent_cache_min_compile_time_secs',
    'jax_persistent_cache_min_entry_size_bytes',
  ]
  before = {name: getattr(jax.config, name) for name in names}
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  programs_lib.compilation_cache.reset_cache()


def test_the_folder_gives_programs_back(tmp_path, restored_cache):
  del restored_cache
  hits = []
  jax.monitoring.register_event_listener(
    lambda name, **_: name.endswith('cache_hits') and hits.append(name)
  )
  use_compilation_cache(tmp_path / 'programs')
  lowered = lambda: jax.jit(lambda x: x * 3 + 1).lower(np.float32(2))
  assert float(lowered().compile()(np.float32(2))) == 7
  assert len(list((tmp_path / 'programs').glob('*-cache'))) == 1
  assert hits == []
  jax.clear_caches()
  assert float(lowered().compile()(np.float32(2))) == 7
  assert len(hits) == 1
