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

import numpy as np

from jaxserve import schedulers
from jaxserve.cache.allocator import PageAllocator
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.metrics import Metrics
from jaxserve.engine.outputs import RequestOutput
from jaxserve.engine.outputs import TokenLogprob
from jaxserve.engine.request import Request
from jaxserve.engine.runner import Runner
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.schedulers import base
from jaxtrain.checkpoints.tokenizer import Tokenizer

_SEED_MASK = (1 << 32) - 1


@dataclasses.dataclass(frozen=True)
class _InFlight:
  """A dispatched step: its result and, per sampled row, whose token it is."""

  result: object
  requests: tuple[Request, ...]


class Engine:
  """Schedules requests, runs steps, commits tokens.

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
    self._max_seq_len = max_seq_len
    self._vocab_size = vocab_size
    self._tokenizer = tokenizer
    self._allocator = PageAllocator(num_pages)
    self._schedule = schedulers.get(config.scheduler)(
      **dict(config.scheduler_kwargs)
    )
    self._free_rows = list(range(config.max_num_requests - 1, -1, -1))
    self._requests: dict[int, Request] = {}
    self._in_flight: _InFlight | None = None
    self._next_id = 0
    self.metrics = Metrics()

  @property
  def num_unfinished(self) -> int:
    """Requests waiting or running."""
    return len(self._requests)

  def add_request(
    self, prompt: str | Sequence[int], params: SamplingParams
  ) -> int:
    """Queues a prompt and returns the request's number.

    Args:
      prompt: Text, or token ids.
      params: How to continue it.

    Raises:
      ValueError: The prompt is empty or longer than the context, a token id is
        out of range, text without a tokenizer, more logprobs than compiled
        for, or more pages needed than the pool has.
    """
    request_id = self._next_id
    ids = self._encode(prompt, request_id)
    max_tokens = self._max_tokens(len(ids), params, request_id)
    if (params.logprobs or 0) > self._runner.num_logprobs:
      raise ValueError(
        f'request {request_id}: logprobs={params.logprobs} is above '
        f'max_logprobs={self._runner.num_logprobs} of the engine'
      )
    stop_ids = set(params.stop_token_ids)
    if self._tokenizer is not None and not params.ignore_eos:
      stop_ids |= set(self._tokenizer.stop_ids)
    if params.stop and self._tokenizer is None:
      raise ValueError(f'request {request_id}: stop texts need a tokenizer')
    # Consecutive numbers of one engine seed give unrelated 32-bit seeds.
    own_seed = (self._config.seed * 0x9E3779B1 + request_id) & _SEED_MASK
    self._requests[request_id] = Request(
      request_id,
      prompt if isinstance(prompt, str) else None,
      ids,
      params,
      max_tokens=max_tokens,
      seed=own_seed if params.seed is None else params.seed & _SEED_MASK,
      stop_ids=frozenset(stop_ids),
      tokenizer=self._tokenizer,
      submitted_s=time.perf_counter(),
    )
    self._next_id += 1
    return request_id

  def abort(self, request_id: int) -> None:
    """Ends a request; its output so far comes with the next `step`."""
    if request_id in self._requests:
      self._requests[request_id].finish('abort')

  def forget(self, request_ids: Sequence[int]) -> None:
    """Ends requests at once, without output; unknown ones are ignored."""
    for i in request_ids:
      if i in self._requests:
        self._requests[i].finish('abort')
        self._release(self._requests.pop(i))

  def step(self) -> list[RequestOutput]:
    """Dispatches the next step, then commits the last one.

    Returns:
      The requests that finished.
    """
    previous, self._in_flight = self._in_flight, self._dispatch()
    if previous is not None:
      self._commit(previous)
    if self._in_flight is None and previous is None:
      if stuck := [r.id for r in self._requests.values() if r.wants_more]:
        raise RuntimeError(
          f'the scheduler {self._config.scheduler!r} runs none of the waiting '
          f'requests {stuck[:8]} on an idle engine'
        )
    return self._collect()

  def _encode(self, prompt, request_id):
    if isinstance(prompt, str):
      if self._tokenizer is None:
        raise ValueError(
          f'request {request_id}: a text prompt needs a tokenizer; give '
          'token ids or LLM(tokenizer=...)'
        )
      ids = self._tokenizer.encode(prompt, add_bos=True) if prompt else []
    else:
      ids = [int(t) for t in prompt]
    if not ids:
      raise ValueError(f'request {request_id}: the prompt is empty')
    bad = [t for t in ids if not 0 <= t < self._vocab_size]
    if bad:
      raise ValueError(
        f'request {request_id}: token ids {bad[:8]} are not in '
        f'0..{self._vocab_size - 1}'
      )
    return ids

  def _max_tokens(self, prompt_len, params, request_id):
    room = self._max_seq_len - prompt_len
    if room < 1:
      raise ValueError(
        f'request {request_id}: the prompt has {prompt_len} tokens, but a '
        f'sequence has at most {self._max_seq_len}, the generated ones included'
      )
    wanted = room if params.max_tokens is None else min(params.max_tokens, room)
    # The last token is returned and never computed: it needs no slot.
    pages = -(-(prompt_len + wanted - 1) // self._config.page_size)
    if pages > self._allocator.num_pages:
      raise ValueError(
        f'request {request_id} can never fit: {prompt_len} prompt and {wanted} '
        f'new tokens need {pages} pages of {self._config.page_size}, and the '
        f'pool has {self._allocator.num_pages}'
      )
    return wanted

  def _dispatch(self) -> _InFlight | None:
    """Plans a step and sends it to the device; `None` if nothing can run."""
    live = [r for r in self._requests.values() if r.wants_more]
    # Rows of requests whose last token has not been read yet.
    ending = self._config.max_num_requests - len(self._free_rows)
    ending -= sum(r.row is not None for r in live)
    plan = self._schedule(
      [r.view() for r in live],
      base.Budget(
        max_tokens=self._config.max_step_tokens,
        max_requests=self._config.max_num_requests - ending,
        free_pages=self._allocator.num_free,
        page_size=self._config.page_size,
      ),
    )
    for i in plan.preempt:
      self._preempt(self._requests[i])
    if not plan.run:
      return None
    scheduled = [(self._requests[i], count) for i, count in plan.run.items()]
    for r, count in scheduled:
      self._make_room(r, count)
    layout, buffer, sampling = self._fill(scheduled)
    result = self._runner.run(layout, buffer)
    for r, count in scheduled:
      r.num_computed += count
    for r in sampling:
      r.num_pending += 1
    self._record(layout, scheduled)
    return _InFlight(result, tuple(sampling))

  def _make_room(self, r, count):
    if r.row is None:
      r.row = self._free_rows.pop()
    end = r.num_computed + count
    need = -(-end // self._config.page_size) - len(r.pages)
    if need > 0:
      r.pages += self._allocator.take(need)

  def _release(self, r):
    self._allocator.give_back(r.pages)
    r.pages = []
    if r.row is not None:
      self._free_rows.append(r.row)
      r.row = None

  def _preempt(self, r):
    self._release(r)
    r.num_computed = 0
    r.num_preemptions += 1
    self.metrics.num_preemptions += 1

  def _fill(self, scheduled):
    """Writes a step's buffer; returns which requests it samples, in order."""
    scheduled = sorted(scheduled, key=lambda item: item[0].row)
    layout = self._runner.layout_for(sum(count for _, count in scheduled))
    buffer, f = layout.empty()
    page_size = self._config.page_size
    start, sampling = 0, []
    for r, count in scheduled:
      stop = start + count
      first, last = r.num_computed, r.num_computed + count
      known = r.tokens[first:last]
      f['tokens'][start:stop] = known + [-1] * (count - len(known))
      positions = np.arange(first, last)
      f['positions'][start:stop] = positions
      pages = np.asarray(r.pages)
      f['slot'][start:stop] = (
        pages[positions // page_size] * page_size + positions % page_size
      )
      f['token_row'][start:stop] = r.row
      f['query_start'][r.row + 1 :] = stop
      f['kv_len'][r.row] = last
      f['page_table'][r.row, : len(pages)] = pages
      if last == len(r.tokens) + r.num_pending:
        self._fill_sampling(f, len(sampling), r, stop - 1)
        sampling.append(r)
      start = stop
    return layout, buffer, sampling

  def _fill_sampling(self, f, u, r, index):
    f['sample_index'][u] = index
    f['sample_row'][u] = r.row
    f['seed'].view(np.uint32)[u] = r.seed
    p = r.params
    f['temperature'][u] = p.temperature
    f['top_k'][u] = min(p.top_k, self._vocab_size)
    f['top_p'][u] = p.top_p
    f['min_p'][u] = p.min_p
    f['num_logprobs'][u] = -1 if p.logprobs is None else p.logprobs

  def _commit(self, step: _InFlight):
    """Reads a step's tokens and gives them to their requests."""
    if not step.requests:
      return
    tokens, logprobs, top_ids, top_logprobs = step.result.read()
    now = time.perf_counter()
    for u, r in enumerate(step.requests):
      r.num_pending -= 1
      if r.finish_reason is not None:
        continue  # Ended by the token before this one.
      if r.first_token_s is None:
        r.first_token_s = now
      logprob = None
      if (n := r.params.logprobs) is not None:
        logprob = TokenLogprob(
          int(tokens[u]),
          float(logprobs[u]),
          tuple(
            zip(
              top_ids[u, :n].tolist(), top_logprobs[u, :n].tolist(), strict=True
            )
          ),
        )
      r.append(int(tokens[u]), logprob)
      self.metrics.num_generated += 1

  def _collect(self):
    """Releases and returns what has finished and has nothing in flight.

    Pages go back at once: the steps that still read them are already queued on
    the device ahead of any that could write them again.
    """
    done = []
    now = time.perf_counter()
    for r in list(self._requests.values()):
      if r.finish_reason is not None:
        self._release(r)
        del self._requests[r.id]
        done.append(r.output(now))
    self.metrics.num_finished += len(done)
    return done

  def _record(self, layout, scheduled):
    running = [r for r in self._requests.values() if r.row is not None]
    self.metrics.record_step(
      num_tokens=sum(count for _, count in scheduled),
      bucket=layout.num_tokens,
      num_running=len(running),
      num_waiting=len(self._requests) - len(running),
      pages_in_use=self._allocator.num_used,
      cached_tokens=sum(r.num_computed for r in running),
      page_size=self._config.page_size,
    )
