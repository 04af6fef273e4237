"""The engine: continuous batching over paged KV, one step at a time.

Yu et al., "Orca", OSDI 2022 (iteration-level scheduling, section 4.1), over the
paged memory of Kwon et al., https://arxiv.org/abs/2309.06180.

A step is planned and dispatched before the tokens of the last one are read:
where a request goes on from a token still on the device, the step finds it
there. What the unread token may end (a stop token, a stop text) is noticed one
step late, and the surplus token is dropped.
"""

from collections.abc import Sequence
import dataclasses
import time
from typing import Any

import numpy as np

from jaxserve import schedulers
from jaxserve.cache.prefix import Stats
from jaxserve.engine import admission
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.filling import Filled
from jaxserve.engine.filling import Filler
from jaxserve.engine.memory import Memory
from jaxserve.engine.metrics import Metrics
from jaxserve.engine.outputs import RequestOutput
from jaxserve.engine.outputs import logprobs_of_row
from jaxserve.engine.request import NO_TOKEN
from jaxserve.engine.request import Continuation
from jaxserve.engine.request import Request
from jaxserve.engine.request import Sink
from jaxserve.engine.runner import Runner
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.schedulers import base
from jaxtrain.checkpoints.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class _InFlight:
  """A dispatched step: its result, and what its sampled rows stand for."""

  result: Any
  filled: Filled
  sent_s: float


class Engine:
  """Schedules requests, runs steps, commits tokens.

  Not thread-safe: one thread calls it (`AsyncEngine` is that thread).

  Args:
    runner: Programs and pages.
    config: Sizes.
    max_seq_len: Longest request, in tokens.
    num_pages: Pages in the runner's pool.
    vocab_size: Token ids are below it.
    tokenizer: For text in and out; `None` works on token ids only.
  """

  def __init__(
    self,
    runner: Runner,
    config: EngineConfig,
    *,
    max_seq_len: int,
    num_pages: int,
    vocab_size: int,
    tokenizer: Tokenizer | None = None,
  ):
    self._runner = runner
    self._config = config
    self._admission = admission.Admission(
      config,
      max_seq_len=max_seq_len,
      num_pages=num_pages,
      num_logprobs=runner.num_logprobs,
      max_stop_ids=runner.sizes.max_stop_ids,
      vocab_size=vocab_size,
      tokenizer=tokenizer,
    )
    self._memory = Memory(runner, config, num_pages)
    self._filler = Filler(runner, config)
    self._schedule = schedulers.get(config.scheduler)(
      **dict(config.scheduler_kwargs)
    )
    self._free_rows = list(range(config.max_num_requests - 1, -1, -1))
    self._requests: dict[int, Request] = {}
    self._continuations: dict[int, Continuation] = {}
    self._in_flight: _InFlight | None = None
    self._next_id = 0
    self._next_uid = 0
    self._read_s = 0.0
    self.metrics = Metrics()

  @property
  def num_unfinished(self) -> int:
    """Requests waiting or running."""
    return len(self._requests)

  @property
  def num_held_pages(self) -> int:
    """Pages that requests hold; what only the prefix cache holds is free."""
    return self._memory.num_held

  @property
  def prefix_stats(self) -> Stats:
    """What the prefix cache was good for; all zero without one."""
    cache = self._memory.prefix
    return Stats() if cache is None else cache.stats

  def add_request(
    self,
    prompt: str | Sequence[int],
    params: SamplingParams,
    *,
    priority: int = 0,
    client: str = '',
    sink: Sink | None = None,
  ) -> int:
    """Queues a prompt and returns the request's number.

    Args:
      prompt: Text, or token ids.
      params: How to continue it.
      priority: Larger runs earlier, where the scheduler looks at it.
      client: Whose it is, where the scheduler is fair to clients.
      sink: Called by `step` with every `Delta` of the request.

    Raises:
      ValueError: The prompt is empty or longer than the context, a token id is
        out of range, text without a tokenizer, something the engine was not
        compiled for, or more pages needed than the pool has. It is named.
    """
    request_id = self._next_id
    try:
      request = self._admission.request(
        prompt, params, request_id, priority, client, sink
      )
      continuations = self._admission.continuations(
        request, self._next_uid, self._memory.keys
      )
    except ValueError as e:
      raise ValueError(f'request {request_id}: {e}') from None
    self._next_id += 1
    self._next_uid += params.n
    self._requests[request_id] = request
    self._continuations |= {c.id: c for c in continuations}
    return request_id

  def prepare_grammars(self) -> None:
    """Does now what the first request with a grammar would wait for.

    Unlike the other methods, in any thread.
    """
    self._admission.prepare_grammars()

  def abort(self, request_id: int) -> None:
    """Ends a request; its output so far comes with the next `step`."""
    if request_id in self._requests:
      for c in self._requests[request_id].continuations:
        if c.finish_reason is None:
          c.finish('abort')

  def forget(self, request_ids: Sequence[int]) -> None:
    """Ends requests at once, without output; unknown ones are ignored."""
    for i in request_ids:
      if i in self._requests:
        for c in self._requests.pop(i).continuations:
          if c.id in self._continuations:
            c.finish('abort')
            self._release(self._continuations.pop(c.id))

  def update_params(self, params: Any) -> None:
    """Serves other parameters from the next step on, without a copy.

    Running requests go on with the keys and values they have; what the prefix
    cache has is forgotten.

    Raises:
      ValueError: Tree, shapes, dtypes or shardings are not those of before.
    """
    self._runner.update_params(params)
    if self._memory.prefix is not None:
      self._memory.prefix.clear()

  def step(self) -> list[RequestOutput]:
    """Dispatches the next step, then commits the last one.

    A step that fails ends the requests it ran, with the error, and no others.

    Returns:
      The requests that finished.
    """
    previous, self._in_flight = self._in_flight, None
    before = self.metrics.num_failed_steps, self.metrics.num_preemptions
    self._in_flight = self._dispatch()
    touched = [] if previous is None else self._commit(previous)
    # Whoever was preempted may have shared its pages: the next plan knows.
    now = self.metrics.num_failed_steps, self.metrics.num_preemptions
    if self._in_flight is None and previous is None and now == before:
      if stuck := [c for c in self._continuations.values() if c.is_live]:
        raise RuntimeError(
          f'the scheduler {self._config.scheduler!r} runs none of the waiting '
          f'requests {sorted({c.request.id for c in stuck})[:8]} on an idle '
          'engine'
        )
    return self._collect(touched)

  def _dispatch(self) -> _InFlight | None:
    """Plans a step and sends it to the device; `None` if nothing can run."""
    live = [c for c in self._continuations.values() if c.is_live]
    if not live:
      return None
    scheduled = self._place(self._plan(live))
    if not scheduled:
      return None
    try:
      self._memory.flush()
      self._set_masks(scheduled)
      many = self._many_steps(scheduled)
      filled = (
        self._filler.fill_many(many) if many else self._filler.fill(scheduled)
      )
      result = self._runner.run(filled.layout, filled.buffer)
    except Exception as e:
      self._fail_step(scheduled, e)
      return None
    for c, count in filled.scheduled:
      c.num_computed += count
    _change_pending(filled, 1)
    for c, _ in filled.scheduled:
      self._memory.publish(c)
    self._record(filled)
    return _InFlight(result, filled, time.perf_counter())

  def _plan(self, live):
    # Rows of requests whose last token has not been read yet.
    ending = self._config.max_num_requests - len(self._free_rows)
    ending -= sum(c.row is not None for c in live)
    return self._schedule(
      [c.view() for c in live],
      base.Budget(
        max_tokens=min(
          self._config.max_step_tokens, self._runner.max_ready_tokens
        ),
        max_requests=self._config.max_num_requests - ending,
        free_pages=self._memory.num_free,
        page_size=self._config.page_size,
        now_s=time.perf_counter(),
        num_cached=lambda r: self._memory.num_cached(self._continuations[r.id]),
        num_shared=lambda r: self._memory.num_shared(self._continuations[r.id]),
      ),
    )

  def _place(self, plan):
    """Carries a plan out in memory; returns who runs, and how many tokens."""
    for i in plan.preempt:
      self._preempt(self._continuations[i])
    scheduled = []
    for i, count in plan.run.items():
      c = self._continuations[i]
      count = self._memory.place(c, count)
      if count == 0:
        continue
      if c.row is None:
        c.row = self._free_rows.pop()
        self._filler.enter(c)
      scheduled.append((c, count))
    return scheduled

  def _many_steps(self, scheduled):
    """How many tokens each decodes in one call of several steps, or `None`.

    Only where all that is live decodes, and no step needs the host.
    """
    num_steps = self._config.decode_steps
    if num_steps == 1 or len(scheduled) < sum(
      c.finish_reason is None for c in self._continuations.values()
    ):
      return None
    if self._runner.decode_layout_for(len(scheduled)) is None:
      return None  # Not compiled yet.
    many = []
    for c, count in scheduled:
      is_decode = count == 1 and c.num_computed + 1 == c.num_tokens
      needs_host = c.matcher is not None or c.params.taps
      too_many = len(c.stop_ids) > self._runner.sizes.max_stop_ids
      if not is_decode or needs_host or too_many:
        return None
      count = min(num_steps, c.max_tokens - c.num_generated)
      if not self._memory.place(c, count):
        return None
      many.append((c, count))
    return many

  def _release(self, c, keep=True):
    self._memory.release(c, keep and c.finish_reason != 'error')
    if c.row is not None:
      self._free_rows.append(c.row)
      c.row = None

  def _preempt(self, c):
    self._memory.preempt(c)
    self._free_rows.append(c.row)
    c.row = None
    c.num_preemptions += 1
    self.metrics.num_preemptions += 1
    self.metrics.num_swapped = self._memory.num_swapped

  def _set_masks(self, scheduled):
    """Tells the device which tokens the grammars allow next."""
    rows, masks = [], []
    for c, count in scheduled:
      if c.matcher is not None and c.num_computed + count == c.num_tokens:
        mask = c.matcher.mask()
        if c.features.mask is not None:
          mask = mask & c.features.mask
        if not mask.any():
          c.fail(c.matcher.error or NO_TOKEN)
        rows.append(c.row)
        masks.append(mask)
    if rows:
      self._runner.set_masks(rows, np.stack(masks))

  def _fail_step(self, scheduled, error):
    """Ends whom a failed step ran; everybody else is computed again.

    What the failed step was to leave in the pool, and what was dispatched on
    top of it, is lost: the pool starts anew.
    """
    for c, _ in scheduled:
      if c.finish_reason is None:
        c.fail(f'{type(error).__name__}: {error}')
    later, self._in_flight = self._in_flight, None
    if later is not None:
      _change_pending(later.filled, -1)
      for c, target in zip(
        later.filled.sampling, later.filled.targets, strict=True
      ):
        c.num_looked_up -= target >= 0
    for c in self._continuations.values():
      if not c.is_swapped:
        self._release(c, keep=False)
        c.num_computed = 0
        c.taps.clear()
    self._memory.forget_all()
    self._runner.reset()
    self.metrics.num_failed_steps += 1

  def _commit(self, step: _InFlight) -> list[Continuation]:
    """Reads a step's tokens and gives them to their continuations."""
    filled = step.filled
    taps = any(c.params.taps for c, _ in filled.scheduled)
    if not filled.sampling and not taps:
      return []
    try:
      if taps:
        self._commit_taps(filled, step.result.read_taps())
      sampled = step.result.read()
    except Exception as e:
      self._fail_step(filled.scheduled, e)
      return []
    now = time.perf_counter()
    self._time_prefill(step, now)
    _change_pending(filled, -1)
    for one in sampled.steps():
      rows = zip(
        filled.sampling, filled.targets, one.tokens.tolist(), strict=False
      )
      for u, (c, target, token) in enumerate(rows):
        # Else ended by the token before this one, or in an earlier step. What
        # is said of its prompt is still wanted then.
        wanted = c.finish_reason is None or (target >= 0 and c.error is None)
        if wanted and token >= 0:
          self._commit_row(c, target, token, one, u, now)
    return filled.sampling

  def _commit_row(self, c, target, token, sampled, u, now):
    if not sampled.is_finite[u]:
      self._poison(c)
    elif target >= 0:
      n = c.params.prompt_logprobs
      c.request.prompt_logprobs.append(logprobs_of_row(sampled, u, target, n))
    else:
      self._append(c, token, sampled, u, now)

  def _commit_taps(self, filled, states):
    steps = zip(filled.scheduled, filled.starts, filled.firsts, strict=True)
    for (c, count), start, first in steps:
      # Else it was preempted meanwhile, and computes them again.
      is_next = first == sum(x.shape[1] for x in c.taps)
      if c.params.taps and c.finish_reason is None and is_next:
        which = [self._config.taps.index(name) for name in c.params.taps]
        c.taps.append(states[which, start : start + count])

  def _time_prefill(self, step, now):
    """Learns how fast prompts are computed, from steps that compute some."""
    since, self._read_s = max(step.sent_s, self._read_s), now
    num_tokens = sum(count for _, count in step.filled.scheduled)
    if num_tokens > len(step.filled.sampling):
      self._memory.costs.prefill.observe(num_tokens, now - since)

  def _append(self, c, token, sampled, u, now):
    if c.request.first_token_s is None:
      c.request.first_token_s = now
    n = c.params.logprobs
    c.append(
      token, None if n is None else logprobs_of_row(sampled, u, token, n)
    )
    self.metrics.num_generated += 1

  def _poison(self, c):
    """Ends one request alone, and cleans the pages it may have spoilt."""
    c.fail('the logits are not finite (NaN, or every token masked)')
    self._memory.scrub(c)
    self.metrics.num_poisoned += 1

  def _collect(self, touched):
    """Sends what is new; releases and returns what has finished.

    Pages go back at once: the steps that still read them are already queued on
    the device ahead of any that could write them again.
    """
    now = time.perf_counter()
    done = []
    ended = [c for c in self._continuations.values() if c.finish_reason]
    for c in ended:
      self._release(c)
      del self._continuations[c.id]
    for c in {c.id: c for c in (*touched, *ended)}.values():
      c.send(now)
    for request in {c.request.id: c.request for c in ended}.values():
      if request.is_finished and request.id in self._requests:
        del self._requests[request.id]
        done.append(request.output(now))
    self.metrics.num_finished += len(done)
    return done

  def _record(self, filled):
    running = [c for c in self._continuations.values() if c.row is not None]
    page_size = self._config.page_size
    wasted = sum(len(c.pages) * page_size - c.num_computed for c in running)
    self.metrics.record_step(
      num_tokens=sum(count for _, count in filled.scheduled),
      bucket=filled.layout.num_tokens * filled.layout.num_steps,
      num_running=len(running),
      num_waiting=len(self._continuations) - len(running),
      pages_in_use=self._memory.num_held,
      wasted_slots=wasted,
      page_size=page_size,
    )


def _change_pending(filled, sign):
  """Counts the tokens that a step samples as on their way, or as arrived."""
  counts = [1] * len(filled.sampling)
  if filled.layout.num_steps > 1:
    counts = [n for _, n in filled.scheduled]
  for c, target, n in zip(filled.sampling, filled.targets, counts, strict=True):
    c.num_pending += sign * n * (target < 0)
