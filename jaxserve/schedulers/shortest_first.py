"""Shortest predicted job first, without starvation.

Jin et al., "S3: Increasing GPU Utilization during Generative Inference for
Higher Throughput", NeurIPS 2023, https://arxiv.org/abs/2306.06000: memory is
set aside for the predicted length, and a request that overruns it is given
twice as much (section 3.3).

Fu et al., "Efficient LLM Scheduling by Learning to Rank", NeurIPS 2024,
https://arxiv.org/abs/2408.15792: by increasing predicted length, and a request
that has not run for `patience` steps goes before all others (algorithm 1).

Deviations: requests that run are not stopped for shorter ones that come later,
as their pages would be lost; so one that was promoted stays so (the paper
demotes it after a quantum). S3 packs requests into memory by *decreasing*
length; the order here is that of the second paper.
"""

from collections.abc import Mapping
import dataclasses
import types
from typing import Any

from jaxserve.schedulers import _seen
from jaxserve.schedulers import base
from jaxserve.schedulers import predictors
from jaxserve.schedulers.predictors.base import Predictor


def shortest_first(
  predictor: str | Predictor = 'history',
  predictor_kwargs: Mapping[str, Any] = types.MappingProxyType({}),
  chunk: int = 512,
  patience: int = 1024,
) -> base.Scheduler:
  """Admits the request that is expected to generate the fewest tokens.

  Args:
    predictor: Name of a file in `predictors`, or the predictor itself.
    predictor_kwargs: Arguments of a named predictor.
    chunk: Tokens of one prompt that a step computes at most.
    patience: Steps a request may be left out before it goes first. Where most
      requests wait longer, the order is that of their arrival.
  """
  if isinstance(predictor, str):
    predictor = predictors.get(predictor)(**dict(predictor_kwargs))
  return ShortestFirst(predictor, chunk, patience)


@dataclasses.dataclass
class _Job:
  prompt: Any
  max_tokens: int
  predicted: float
  num_generated: int = 0
  num_idle: int = 0
  is_promoted: bool = False


class ShortestFirst:
  """The scheduler."""

  def __init__(self, predictor: Predictor, chunk: int, patience: int):
    self._predictor = predictor
    self._chunk = chunk
    self._patience = patience
    self._jobs = _seen.Seen(self._job)

  def __call__(self, requests, budget):
    _, ended = self._jobs.update(requests)
    for job in ended:
      self._predictor.observe(job.prompt, job.num_generated)
    for r in requests:
      self._supervise(r)
    rank = {r.id: self._rank(r) for r in requests}
    ordered = sorted(
      requests, key=lambda r: (not r.is_decoding, not r.is_running, rank[r.id])
    )
    plan = base.admit(
      ordered,
      budget,
      self._chunk,
      rank=lambda r: rank[r.id],
      expected_pages=lambda r: self._expected_pages(r, budget.page_size),
    )
    for r in requests:
      job = self._jobs[r.id]
      if r.id in plan.run:
        job.num_idle = 0
        samples = plan.run[r.id] == r.num_tokens - budget.start(r)
        job.num_generated = r.num_generated + samples
      else:
        job.num_idle += 1
    return plan

  def _job(self, r):
    predicted = max(1.0, self._predictor(r.prompt, r.max_tokens))
    return _Job(r.prompt, r.max_tokens, predicted)

  def _supervise(self, r):
    job = self._jobs[r.id]
    job.num_generated = r.num_generated
    while job.predicted <= r.num_generated < job.max_tokens:
      job.predicted *= 2
    job.is_promoted |= job.num_idle >= self._patience

  def _rank(self, r):
    job = self._jobs[r.id]
    return (
      not job.is_promoted,
      0.0 if job.is_promoted else job.predicted,
      r.arrival,
    )

  def _expected_pages(self, r, page_size):
    job = self._jobs[r.id]
    generated = min(job.predicted, job.max_tokens)
    # The last token is never computed.
    return -int(-(len(r.prompt) + generated - 1) // page_size)
