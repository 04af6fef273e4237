"""Every schedule warms up, peaks, ends at its final value, and is traceable."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain import schedules

_PEAK, _STEPS, _WARMUP = 0.5, 40, 8


@pytest.fixture(params=schedules.names())
def name(request):
  return request.param


def _make(name, **kwargs):
  defaults = dict(peak_value=_PEAK, num_steps=_STEPS, warmup_steps=_WARMUP)
  return schedules.get(name)(**(defaults | kwargs))


def _values(schedule):
  return np.array([schedule(i) for i in range(_STEPS + 20)])


def test_is_finite_and_between_zero_and_the_peak(name):
  values = _values(_make(name))
  assert np.all(np.isfinite(values))
  assert np.all(values >= 0) and np.all(values <= _PEAK * (1 + 1e-6))


def test_warms_up_linearly_from_more_than_nothing(name):
  values = _values(_make(name))
  expected = _PEAK * np.arange(1, _WARMUP + 1) / _WARMUP
  np.testing.assert_allclose(values[:_WARMUP], expected, rtol=1e-6)
  np.testing.assert_allclose(values[_WARMUP], _PEAK, rtol=1e-6)


def test_never_rises_after_the_warmup(name):
  assert np.all(np.diff(_values(_make(name))[_WARMUP:]) <= 1e-7)


@pytest.mark.parametrize('final_value', [0.0, 0.1])
def test_ends_at_the_final_value(name, final_value):
  values = _values(_make(name, final_value=final_value))
  np.testing.assert_allclose(values[_STEPS:], final_value, atol=1e-7)
  assert values[_STEPS - 1] > final_value + 1e-4


def test_no_warmup_starts_at_the_peak(name):
  np.testing.assert_allclose(_make(name, warmup_steps=0)(0), _PEAK, rtol=1e-6)


def test_warmup_may_be_everything(name):
  values = _values(_make(name, warmup_steps=_STEPS))
  np.testing.assert_allclose(values[_STEPS - 1], _PEAK, rtol=1e-6)
  np.testing.assert_allclose(values[_STEPS:], 0.0, atol=1e-7)


def test_a_traced_step_gives_the_same(name):
  schedule = _make(name)
  steps = jnp.arange(_STEPS + 20)
  traced = jax.jit(jax.vmap(schedule))(steps)
  assert traced.dtype == jnp.float32
  np.testing.assert_allclose(traced, _values(schedule), rtol=1e-5, atol=1e-7)


def test_drives_an_optax_transformation(name):
  tx = optax.scale_by_learning_rate(_make(name))
  state = tx.init(jnp.ones(()))
  for i in range(3):
    update, state = tx.update(jnp.ones(()), state)
    np.testing.assert_allclose(update, -_PEAK * (i + 1) / _WARMUP, rtol=1e-6)


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(num_steps=0, warmup_steps=0), 'num_steps=0 must be at least 1'),
    (dict(warmup_steps=-1), 'warmup_steps=-1 is negative'),
    (dict(warmup_steps=41), 'warmup_steps=41.* is more than num_steps=40'),
  ],
)
def test_wrong_steps_are_named(name, change, message):
  with pytest.raises(ValueError, match=message):
    _make(name, **change)
