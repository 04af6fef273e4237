"""Memory by class, and the advice that is computed from it."""

from pallas_kernels.tpu_compiler import memory as memory_lib
from pallas_kernels.tpu_compiler.memory import GIB
from pallas_kernels.tpu_compiler.memory import Memory

_ARGUMENTS = {
  "[0].params['w']": 4 * GIB,
  "[0].opt_state[0].mu['w']": 4 * GIB,
  "[0].opt_state[0].nu['w']": 4 * GIB,
  '[0].step': 4,
  "[1]['tokens']": GIB,
}
_MEMORY = Memory(
  arguments=13 * GIB + 100,
  outputs=0,
  aliased=0,
  temporaries=8 * GIB,
  generated_code=1000,
  peak=20 * GIB,
  collectives=2 * GIB,
)
_CLASSES = {**memory_lib.CLASSES, '[1]': 'batch', "[1]['w": 'never'}


def test_classes_add_up_to_the_total():
  sizes = memory_lib.by_class(_MEMORY, _ARGUMENTS, _CLASSES)
  assert sizes == {
    'parameters': 4 * GIB,
    'optimizer state': 8 * GIB,
    'batch': GIB,
    'other arguments': 4,
    'padding of arguments': 96,
    'collective buffers': 2 * GIB,
    'activations and temporaries': 5 * GIB - 100,
    'program': 1000,
  }
  assert sum(sizes.values()) == _MEMORY.total


def test_the_longest_start_of_a_path_counts():
  classes = {'[0]': 'a', '[0].params': 'b', '[0].p': 'c'}
  assert memory_lib.argument_classes(_ARGUMENTS, classes) == {
    'a': 8 * GIB + 4,
    'b': 4 * GIB,
    'other arguments': GIB,
  }


def test_advice_says_what_is_enough():
  sizes = memory_lib.by_class(_MEMORY, _ARGUMENTS, _CLASSES)
  whole = {'parameters': 32 * GIB, 'optimizer state': 64 * GIB}
  text = memory_lib.advice(sizes, whole, 16, 16.0 * GIB)
  first, *lines = text.splitlines()
  assert first.startswith('4.00 GiB too much; largest: optimizer state')
  # 8 GiB of state are split 8 ways; over 16 devices they are 4.
  assert '  4.00 GiB: split optimizer state over all 16 devices, not 8' in text
  assert '  8.00 GiB, enough: optimizer state in host memory' in text
  assert lines[0].startswith('  8.00 GiB')
  assert any('micro-batches' in line and 'enough' in line for line in lines)
  assert memory_lib.advice(sizes, whole, 16, 24.0 * GIB).startswith(
    'fits, with 4.00 GiB to spare'
  )


def test_advice_for_pages_and_for_the_hopeless():
  sizes = {'parameters': 2 * GIB, 'KV pages': 18 * GIB}
  text = memory_lib.advice(sizes, {'parameters': 2 * GIB}, 1, 16.0 * GIB)
  assert '4.00 GiB, enough: 78% of the KV pages' in text
  text = memory_lib.advice({'parameters': 32 * GIB}, {}, 1, 16.0 * GIB)
  assert 'no change is enough' in text
