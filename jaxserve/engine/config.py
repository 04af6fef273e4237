"""Sizes of a serving engine."""

from collections.abc import Mapping
import dataclasses
import types
from typing import Any

_PREEMPTION = ('auto', 'recompute', 'swap')


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """What an engine is compiled for.

  Attributes:
    max_num_requests: Requests that run at once (rows of the batch).
    max_seq_len: Prompt plus generated tokens of one request; `None` is the
      model's own context length.
    page_size: Tokens of one page of KV cache.
    num_pages: Pages in the pool; `None` gives every row room for `max_seq_len`
      tokens, up to `cache_bytes`.
    cache_bytes: Bound, over all devices, on the pool chosen by
      `num_pages=None`.
    max_step_tokens: Tokens that one step computes at most.
    token_buckets: Numbers of tokens that steps are compiled for; `None`
      compiles for a quarter of the rows, all rows, and `max_step_tokens`.
    scheduler: Name of a file in `jaxserve/schedulers`.
    scheduler_kwargs: Its arguments.
    sampler: Name of a file in `jaxserve/samplers`.
    attention: Name of a file in `jaxserve/attention`.
    max_logprobs: Largest `SamplingParams.logprobs` that will be asked for.
    seed: Seeds the requests that bring no seed of their own.
    kv_dtype: Dtype of the pages; `None` is the compute dtype.
    prefix_cache: Keep the pages of what was computed, and find them by prefix.
    prefix_score: Name of a function of `jaxserve.cache.scores`: which cached
      page is given up first.
    preemption: 'recompute', 'swap' (to host memory), or 'auto': whichever is
      expected to be faster.
    host_cache_bytes: Host memory for swapped and evicted pages, half for each;
      0 keeps none.
    max_logit_bias: Largest number of tokens in `SamplingParams.logit_bias`.
    taps: Hidden states that requests may ask for, such as 'layers.3.output'.
    decode_steps: Steps that run in one call when all that runs is decoding.
    constraints: Name of a file in `jaxserve/constraints`.
    background_compile: Serve as soon as one program is compiled, and compile
      the others meanwhile.
    strict_compile: A compilation after the start is an error.
    compilation_cache: Folder of compiled programs that outlive the process.
  """

  max_num_requests: int = 32
  max_seq_len: int | None = None
  page_size: int = 16
  num_pages: int | None = None
  cache_bytes: int = 1 << 30
  max_step_tokens: int = 256
  token_buckets: tuple[int, ...] | None = None
  scheduler: str = 'chunked_prefill'
  scheduler_kwargs: Mapping[str, Any] = dataclasses.field(
    default_factory=lambda: types.MappingProxyType({})
  )
  sampler: str = 'truncated'
  attention: str = 'paged'
  max_logprobs: int = 5
  seed: int = 0
  kv_dtype: Any = None
  prefix_cache: bool = True
  prefix_score: str = 'lru'
  preemption: str = 'auto'
  host_cache_bytes: int = 0
  max_logit_bias: int = 32
  taps: tuple[str, ...] = ()
  decode_steps: int = 1
  constraints: str = 'llguidance'
  background_compile: bool = False
  strict_compile: bool = False
  compilation_cache: str | None = None

  def __post_init__(self):
    for name in (
      'max_num_requests',
      'page_size',
      'max_step_tokens',
      'cache_bytes',
      'decode_steps',
    ):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
    for name in ('max_seq_len', 'num_pages'):
      if getattr(self, name) is not None and getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
    for name in ('max_logprobs', 'host_cache_bytes', 'max_logit_bias'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}={getattr(self, name)} must not be negative')
    if self.preemption not in _PREEMPTION:
      raise ValueError(
        f'preemption={self.preemption!r} must be one of {_PREEMPTION}'
      )
    if self.preemption == 'swap' and not self.host_cache_bytes:
      raise ValueError("preemption='swap' needs host_cache_bytes above 0")
    if self.max_step_tokens < self.max_num_requests:
      raise ValueError(
        f'max_step_tokens={self.max_step_tokens} must be at least '
        f'max_num_requests={self.max_num_requests}: every running request may '
        'decode in one step'
      )
    if self.buckets[-1] < self.max_step_tokens or self.buckets[0] < 1:
      raise ValueError(
        f'token_buckets={self.token_buckets} must be positive and reach '
        f'max_step_tokens={self.max_step_tokens}'
      )

  @property
  def buckets(self) -> tuple[int, ...]:
    """Sorted numbers of tokens that steps are compiled for."""
    if self.token_buckets is not None:
      return tuple(sorted(set(self.token_buckets))) or (0,)
    rows = self.max_num_requests
    return tuple(sorted({max(1, rows // 4), rows, self.max_step_tokens}))
