"""Processors against a transcription of their definitions, row by row.

Keskar et al., https://arxiv.org/abs/1909.05858, section 4.1 (repetition);
https://platform.openai.com/docs/api-reference/chat/create (the other two).
"""

import dataclasses
import math
import re

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.samplers.base import Rows
from jaxserve.samplers.base import RowState
from jaxserve.samplers.processors import can_draw
from jaxserve.samplers.processors import masks
from jaxserve.samplers.processors import process
from jaxserve.samplers.truncated import truncated

PENALTIES, BIAS, MASK, MIN_TOKENS = 1, 2, 4, 8
# Rows, those of the engine, vocabulary (no multiple of 32), longest sequence.
U, S, V, M = 6, 5, 77, 12

_process = jax.jit(process)


def _definition(logits, row, state):
  """What becomes of the logits of one row: dictionaries of Python numbers."""
  x = [float(v) for v in logits]
  s = row['row']
  uses = lambda bit: bool(row['features'] & bit)
  for v in range(len(x)):
    if uses(MASK) and not state.mask[s][v // 32] >> np.uint32(v % 32) & 1:
      x[v] = -math.inf
  if uses(MIN_TOKENS) and row['position'] < row['min_position']:
    for v in state.stop_ids[s]:
      if v >= 0:
        x[v] = -math.inf
  if uses(BIAS):
    for v, bias in zip(state.bias_ids[s], state.bias[s], strict=True):
      if v >= 0:
        x[v] += float(bias)
  if uses(PENALTIES):
    text = [int(v) for v in state.history[s][: row['position']]]
    generated = text[row['prompt_len'] :]
    for v in set(text):
      penalty = row['repetition_penalty']
      x[v] = x[v] / penalty if x[v] > 0 else x[v] * penalty
    for v in set(generated):
      count = generated.count(v)
      x[v] -= count * row['frequency_penalty'] + row['presence_penalty']
  return np.float32(x)


def _random(seed):
  """Logits, rows and state of a batch in which anything goes."""
  rng = np.random.default_rng(seed)
  pad = lambda ids: np.where(rng.random(ids.shape) < 0.3, -1, ids)
  words = -(-V // 32)
  state = RowState(
    # Few tokens, so that they repeat.
    history=np.int32(rng.choice(rng.integers(0, V, 6), (S, M))),
    bias_ids=np.int32(pad(rng.integers(0, V, (S, 4)))),
    bias=np.float32(rng.normal(scale=5, size=(S, 4))),
    stop_ids=np.int32(pad(rng.integers(0, V, (S, 3)))),
    mask=rng.integers(0, 2**32, (S, words), dtype=np.uint32),
  )
  position = rng.integers(1, M, U)
  rows = dict(
    row=rng.integers(0, S, U),
    position=position,
    prompt_len=rng.integers(1, position + 1),
    features=rng.integers(0, 16, U) * (rng.random(U) < 0.7),
    min_position=position + rng.integers(-1, 2, U),
    presence_penalty=rng.choice([0.0, 0.7, -1.5], U),
    frequency_penalty=rng.choice([0.0, 0.3, -2.0], U),
    repetition_penalty=rng.choice([1.0, 1.3, 0.5], U),
  )
  logits = np.float32(rng.normal(scale=4, size=(U, V)))
  return logits, rows, state


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_every_row_of_a_mixed_batch_is_as_defined(make_rows, seed):
  logits, rows, state = _random(seed)
  actual = np.asarray(_process(logits, make_rows(U, **rows), state))
  for u in range(U):
    row = {k: v[u].item() for k, v in rows.items()}
    expected = _definition(logits[u], row, state)
    np.testing.assert_allclose(actual[u], expected, rtol=1e-5, atol=1e-5)
    if not row['features']:
      np.testing.assert_array_equal(actual[u], logits[u])


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 5))
@settings(max_examples=60)
def test_a_row_does_not_depend_on_the_others(make_rows, seed, other, u):
  logits, rows, state = _random(seed)
  full = _process(logits, make_rows(U, **rows), state)[u]
  # Among others, who use what they did not, in other rows of the engine.
  others, changed, _ = _random(other)
  others[u] = logits[u]
  for name, values in changed.items():
    values[u] = rows[name][u]
  among = _process(others, make_rows(U, **changed), state)[u]
  np.testing.assert_array_equal(_bits(full), _bits(among))
  alone = {k: v[u : u + 1] for k, v in rows.items()}
  alone = _process(logits[u : u + 1], make_rows(1, **alone), state)[0]
  np.testing.assert_array_equal(_bits(full), _bits(alone))


def _bits(x):
  return np.asarray(x).view(np.uint32)


def test_stale_state_of_other_rows_and_padding_is_not_looked_at(make_rows):
  logits, rows, state = _random(3)
  rows['features'] = np.zeros(U, int)
  rows['row'] = np.full(U, S)
  poison = dataclasses.replace(
    state,
    bias=np.full_like(state.bias, np.nan),
    mask=np.zeros_like(state.mask),
    history=np.full_like(state.history, 2**30),
  )
  args = logits, make_rows(U, **rows), poison
  np.testing.assert_array_equal(_process(*args), logits)
  # A token that is not in the vocabulary counts for none.
  rows |= dict(features=np.full(U, PENALTIES), row=np.zeros(U, int))
  np.testing.assert_array_equal(
    _process(logits, make_rows(U, **rows), poison), logits
  )


def test_what_is_masked_cannot_be_drawn_and_nothing_left_is_reported(make_rows):
  mask = np.zeros((3, 3), np.uint32)
  mask[0, 2] = 1 << (V - 1) % 32  # The last token alone.
  mask[1, 0] = 0b1010
  mask[2, 2] = 1 << 31  # Past the vocabulary.
  state = RowState(
    history=np.zeros((3, M), np.int32),
    bias_ids=np.full((3, 1), 5, np.int32),
    bias=np.full((3, 1), 100.0, np.float32),
    stop_ids=np.full((3, 1), 1, np.int32),
    mask=mask,
  )
  logits = np.float32(np.random.default_rng(0).normal(size=(3, V)))
  for temperature in (0.0, 2.0):
    rows = make_rows(
      3,
      features=MASK | BIAS | MIN_TOKENS,
      min_position=9,
      temperature=temperature,
    )
    processed = _process(logits, rows, state)
    np.testing.assert_array_equal(can_draw(processed), [True, True, False])
    tokens = jax.jit(truncated())(processed, rows)
    assert tokens[0] == V - 1
    assert tokens[1] == 3
  assert np.all(np.isneginf(processed[2]))


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_rows_that_are_not_finite_are_reported(value):
  logits = np.zeros((2, 4), np.float32)
  logits[1, 2] = value
  np.testing.assert_array_equal(can_draw(jnp.array(logits)), [True, False])


def test_repeated_bias_adds_up_and_negative_ids_are_unused(make_rows):
  state = RowState(
    history=np.zeros((1, M), np.int32),
    bias_ids=np.int32([[4, -1, 4]]),
    bias=np.float32([[1.5, 9.0, 2.0]]),
    stop_ids=np.int32([[-1]]),
    mask=np.zeros((1, 3), np.uint32),
  )
  rows = make_rows(1, features=BIAS | MIN_TOKENS, min_position=5)
  processed = _process(np.zeros((1, V), np.float32), rows, state)
  np.testing.assert_array_equal(processed[0], 3.5 * (np.arange(V) == 4))


@pytest.mark.parametrize('vocab', [1, 31, 77, 4096, 9001])
@pytest.mark.parametrize(
  'form', [masks.unpack, masks.unpack_by_shift, masks.unpack_by_product]
)
def test_bits_of_a_mask(form, vocab):
  rng = np.random.default_rng(vocab)
  words = rng.integers(0, 2**32, (3, -(-vocab // 32)), dtype=np.uint32)
  bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder='little')
  actual = jax.jit(form, static_argnums=1)(words, vocab)
  np.testing.assert_array_equal(actual, bits[:, :vocab])


def test_rows_divided_over_devices(make_rows):
  # Of two rows each; the state is everywhere.
  mesh = jax.sharding.Mesh(jax.devices()[:3], ('data',))
  split = jax.jit(
    jax.shard_map(
      process,
      mesh=mesh,
      in_specs=(jax.P('data'), jax.P('data'), jax.P()),
      out_specs=jax.P('data'),
      check_vma=False,
    )
  )
  for seed in range(3):
    logits, rows, state = _random(seed)
    args = logits, make_rows(U, **rows), state
    np.testing.assert_array_equal(split(*args), _process(*args))


def test_a_batch_that_uses_nothing_computes_nothing(make_rows):
  logits, rows, state = _random(0)
  fields = vars(make_rows(U, **rows))
  run = jax.jit(lambda x, fields, s: process(x, Rows(**fields), s))
  text = run.lower(logits, fields, state).compile().as_text()
  entry = text[text.index('ENTRY') :]
  # What is as large as the logits goes from one conditional to the next.
  shape = re.escape(f'f32[{U},{V}]')
  large = re.findall(rf' = \(?{shape}\S* ([\w-]+)\(', entry)
  assert large.count('conditional') == 4
  moved = {'parameter', 'conditional', 'copy', 'get-tuple-element', 'tuple'}
  assert set(large) <= moved
