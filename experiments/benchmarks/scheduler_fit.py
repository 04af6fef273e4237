"""Fits the simulator's costs to the real engine, and checks the simulation."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import LLM
from jaxserve import EngineConfig
from jaxserve import SamplingParams
from jaxserve import schedulers
from jaxserve.simulate import trace
from jaxserve.simulate.cost import CostModel
from jaxserve.simulate.simulator import Machine
from jaxserve.simulate.simulator import simulate
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.config import Rope
from jaxtrain.models.transformer import Transformer

_CONFIG = ModelConfig(
  family='qwen3',
  vocab_size=512,
  embed_dim=256,
  num_layers=6,
  num_heads=4,
  num_kv_heads=2,
  head_dim=64,
  mlp_dim=768,
  max_seq_len=512,
  rope=Rope(theta=1e6),
  qk_norm=True,
  tie_embeddings=True,
)
_ENGINE = EngineConfig(
  max_num_requests=16,
  page_size=16,
  num_pages=512,
  max_step_tokens=256,
  token_buckets=(4, 16, 64, 256),
  prefix_cache=False,  # The same trace is served again.
)
_RUNS = 5
_LENGTHS = trace.Lengths(80, 40, 0.7, longest=240)


def report() -> CostModel:
  """Prints costs, and measured and simulated time of another trace."""
  init = jax.jit(
    lambda k: nn.unbox(Transformer(_CONFIG).init(k, jnp.zeros((1, 2), int)))
  )
  params = init(jax.random.key(0))['params']
  with LLM(params, config=_CONFIG, engine=_ENGINE) as llm:
    _serve(llm, _trace(0))  # Compiles.
    cost = CostModel.fit(_steps(llm, _trace(1)))
    print(
      f'step = {1e3 * cost.fixed_s:.3f} ms + {1e6 * cost.token_s:.2f} us/token '
      f'+ {1e9 * cost.kv_token_s:.1f} ns/cached token'
    )
    arrivals = _trace(2)
    measured = sum(seconds for _, _, seconds in _steps(llm, arrivals))
  machine = Machine(
    cost,
    max_tokens=_ENGINE.max_step_tokens,
    max_requests=_ENGINE.max_num_requests,
    num_pages=_ENGINE.num_pages,
    page_size=_ENGINE.page_size,
    keeps_prefixes=False,
    buckets=_ENGINE.buckets,
  )
  schedule = schedulers.get(_ENGINE.scheduler)(**dict(_ENGINE.scheduler_kwargs))
  simulated = simulate(schedule, arrivals, machine).steps[-1].end_s
  print(
    f'{len(arrivals)} other requests: measured {measured:.2f} s, simulated '
    f'{simulated:.2f} s ({100 * (simulated / measured - 1):+.0f}%)'
  )
  return cost


def _trace(seed):
  arrivals = trace.poisson(1e6, 64, lengths=_LENGTHS, seed=seed)
  return [_within_vocab(a) for a in arrivals]


def _within_vocab(arrival):
  prompt = tuple(t % _CONFIG.vocab_size for t in arrival.prompt)
  return type(arrival)(arrival.time_s, prompt, arrival.num_generated)


def _serve(llm, arrivals):
  """Serves them, all submitted at once."""
  outputs = llm.generate(
    [a.prompt for a in arrivals],
    [
      SamplingParams(max_tokens=a.num_generated, temperature=0, ignore_eos=True)
      for a in arrivals
    ],
    show_progress=False,
  )
  for a, out in zip(arrivals, outputs, strict=True):
    assert len(out.outputs[0].token_ids) == a.num_generated


def _steps(llm, arrivals):
  """Tokens, cached tokens and seconds of each step of a trace.

  The fastest of several runs: they take the same steps, and interruptions by
  other processes are not the engine's.
  """
  runs = []
  for _ in range(_RUNS):
    first = len(llm.engine.metrics.steps)
    _serve(llm, arrivals)
    runs.append(list(llm.engine.metrics.steps)[first:])
  # A step is dispatched once the one before the last has been read: from one
  # dispatch to the next is the time of a step.
  seconds = [np.diff([s.time_s for s in steps]) for steps in runs]
  return [
    (s.bucket, s.cached_tokens, t)
    for s, t in zip(runs[0][:-1], np.min(seconds, axis=0), strict=True)
  ]
