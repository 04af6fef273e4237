"""One step: history, what is drawn, and what is said about it."""

import jax
import jax.numpy as jnp
import numpy as np

_PROMPT = [5, 9, 2, 11, 7]


def _logprobs(tiny, ids):
  return np.asarray(jax.nn.log_softmax(tiny.logits(ids), axis=-1))


def test_tokens_come_from_the_history(driver, tiny):
  tokens = {0: (0, _PROMPT), 3: (0, [4, 4, 8])}
  out = driver.decode(tokens, 6)
  assert out == {r: tiny.greedy(ids, 6) for r, (_, ids) in tokens.items()}
  history = np.asarray(driver.runner._rows.history)
  for row, (_, ids) in tokens.items():
    expected = [*ids, *out[row]]
    np.testing.assert_array_equal(history[row, : len(expected)], expected)


def test_padding_and_other_rows_keep_their_history(driver):
  driver.step({1: (0, _PROMPT)})
  before = np.asarray(driver.runner._rows.history)
  driver.step({2: (3, [1, 2])})
  after = np.asarray(driver.runner._rows.history)
  np.testing.assert_array_equal(np.delete(after, 2, 0), np.delete(before, 2, 0))
  np.testing.assert_array_equal(after[2, :3], before[2, :3])
  np.testing.assert_array_equal(after[2, 3:5], [1, 2])


def test_a_row_set_from_the_host_goes_on_from_its_history(driver, tiny):
  driver.step({0: (0, _PROMPT)})
  known = [*_PROMPT, 1, 2, 3]
  driver.runner.set_row(0, tokens=known)
  out = driver.decode({0: (5, [-1, -1, -1])}, 4)
  assert out[0] == tiny.greedy(known, 4)


def test_targets_are_looked_up_and_not_entered(driver, tiny):
  runner = driver.runner
  layout, buffer = driver.buffer({2: (0, _PROMPT)})
  views = layout._views(buffer)
  n = len(_PROMPT) - 1
  # All positions of one row, and rows of a batch of 4 at most.
  for u in range(4):
    views['sample_index'][u] = u
    views['sample_row'][u] = 2
    views['target'][u] = _PROMPT[u + 1]
    views['num_logprobs'][u] = 2
  out = runner.run(layout, buffer).read()
  expected = _logprobs(tiny, _PROMPT)[:n]
  np.testing.assert_array_equal(out.tokens[:n], _PROMPT[1:])
  np.testing.assert_allclose(
    out.logprobs[:n], expected[np.arange(n), _PROMPT[1:]], atol=1e-4
  )
  best = np.argsort(-expected, axis=-1)[:, :2]
  np.testing.assert_array_equal(out.top_ids[:n, :2], best)
  history = np.asarray(runner._rows.history)[2, : n + 1]
  np.testing.assert_array_equal(history, _PROMPT)


def test_logprobs_are_raw_or_processed_by_row(driver, tiny):
  bias = {11: 4.0, 30: -3.0}
  for row in (0, 1):
    driver.runner.set_row(
      row, bias_ids=list(bias), bias=list(bias.values()), tokens=[]
    )
  out = driver.step(
    {0: (0, _PROMPT), 1: (0, _PROMPT), 2: (0, _PROMPT)},
    features={0: 2, 1: 2},
    temperature={0: 0.7, 1: 0.7, 2: 0.0},
    top_k={0: 5, 1: 5},
    num_logprobs={0: 5, 1: 5},
    wants_processed={0: 1},
  )
  raw = _logprobs(tiny, _PROMPT)[-1]
  logits = tiny.logits(_PROMPT)[-1].copy()
  for token, value in bias.items():
    logits[token] += value
  kept = np.argsort(-logits)[:5]
  cut = np.full_like(logits, -np.inf)
  cut[kept] = logits[kept] / 0.7
  processed = np.asarray(jax.nn.log_softmax(cut))
  for u, expected in ((0, processed), (1, raw)):
    best = np.argsort(-expected)[:5]
    np.testing.assert_array_equal(out.top_ids[u], best)
    np.testing.assert_allclose(out.top_logprobs[u], expected[best], atol=1e-4)
    np.testing.assert_allclose(
      out.logprobs[u], expected[out.tokens[u]], atol=1e-4
    )
  assert set(out.tokens[:2]) <= set(kept)
  # Without a bias and greedy, though the row before it wanted otherwise.
  assert out.tokens[2] == raw.argmax()


def test_stale_state_of_a_row_is_ignored(driver, tiny):
  nothing = np.zeros(driver.runner.sizes.num_mask_words, np.uint32)
  driver.runner.set_row(1, bias_ids=[3], bias=[99.0], mask=nothing)
  out = driver.step({1: (0, _PROMPT)})
  assert out.tokens[0] == tiny.greedy(_PROMPT, 1)[0]
  assert out.is_finite[0]


def test_masks_are_replaced_without_the_rest(driver, tiny):
  best = np.argsort(-tiny.logits(_PROMPT)[-1])
  words = driver.runner.sizes.num_mask_words

  def only(*tokens):
    mask = np.zeros(words, np.uint32)
    for t in tokens:
      mask[t // 32] |= np.uint32(1 << t % 32)
    return mask

  for row in (0, 1, 2):
    driver.runner.set_row(row, mask=only(0))
  driver.runner.set_masks([2, 0], np.stack([only(best[7], best[4]), only(9)]))
  rows = {row: (0, _PROMPT) for row in range(4)}
  features = {0: 4, 1: 4, 2: 4}
  out = driver.step(rows, features=features)
  np.testing.assert_array_equal(out.tokens, [9, 0, best[4], best[0]])
  driver.runner.set_masks([1], only()[None])
  out = driver.step(rows, features=features)
  np.testing.assert_array_equal(out.is_finite, [True, False, True, True])
  assert out.tokens[1] == 0


def test_broken_logits_are_noticed_row_by_row(driver, tiny):
  """A column so large that its logit is +inf in some rows, -inf in others."""
  runner, good = driver.runner, driver.runner._params
  prompts = [[i, 3 * i + 1] for i in range(4)]
  logits = np.stack([tiny.logits(p)[-1] for p in prompts])
  mixed = (logits > 0).any(axis=0) & (logits < 0).any(axis=0)
  column = int(np.argmax(np.where(mixed, np.abs(logits).min(axis=0), 0)))
  assert np.abs(logits[:, column]).min() * 3e38 > np.finfo(np.float32).max
  is_finite = (logits[:, column] < 0).tolist()
  head = np.array(good['unembed']['kernel'])
  head[:, column] *= 3e38
  for bad, expected in ((head, is_finite), (head * np.nan, [False] * 4)):
    try:
      kernel = {'kernel': jnp.asarray(bad)}
      runner.update_params({**good, 'unembed': kernel})
      out = driver.step(
        {row: (0, prompt) for row, prompt in enumerate(prompts)},
        temperature={1: 1.0},
        num_logprobs={2: 1},
      )
    finally:
      runner.update_params(good)
    np.testing.assert_array_equal(out.is_finite, expected)
    for row in (0, 2, 3):
      logits = tiny.logits(prompts[row])[-1].copy()
      logits[column] = -np.inf
      assert out.tokens[row] == (logits.argmax() if expected[row] else 0)
    assert out.tokens[1] == 0 or expected[1]
