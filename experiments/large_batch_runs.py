"""One trial of `large_batch`: an optimizer at a batch size, on real text.

All trials of an optimizer and a batch size are runs of one compiled program:
hyper-parameters are its arguments. The learning rate is constant behind its
warm-up and the evaluated parameters are a running average of the trained ones,
as in Zhang et al., "How Does Critical Batch Size Scale in Pre-training?",
https://arxiv.org/abs/2410.21676, section 2: what a run has reached at some step
does then not depend on how long it was to be. The average is over the last
part of the steps (polynomial, Shamir and Zhang,
https://arxiv.org/abs/1212.1824, section 4), so that it has nothing to tune.

A batch is looked at in groups, whose gradients give the noise scale, and what
`vrgd` wants, at no extra backward pass.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import json
import math
import os
import pathlib
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtrain import data
from jaxtrain import optimizers
from jaxtrain import train_step
from jaxtrain.checkpoints.tokenizer import load_tokenizer
from jaxtrain.data.corpus import tokenize
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import make_mesh

_AVERAGE_POWER = 8.0
_EVAL_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Task:
  """What is trained, the same for all trials.

  Attributes:
    embed_dim: D; the rest of the model follows.
    num_layers: L.
    seq_len: Tokens of a row.
    tokens: That every trial trains on, at which losses are compared.
    longer: A large batch that has not reached `target` goes on to so many times
      `tokens`.
    target: Held-out loss, in nats per byte, that steps are counted to.
    groups: Parts of a batch that gradients are taken of.
    warmup: Part of `tokens` that the learning rate rises over.
    evals: Evaluations within `tokens`, further apart later.
  """

  embed_dim: int = 32
  num_layers: int = 2
  seq_len: int = 64
  tokens: int = 2**18
  longer: float = 4.0
  target: float = 2.4
  groups: int = 4
  warmup: float = 0.1
  evals: int = 24

  @property
  def model(self) -> ModelConfig:
    """A Llama of these sizes over bytes."""
    return ModelConfig(
      vocab_size=264,
      embed_dim=self.embed_dim,
      num_layers=self.num_layers,
      num_heads=self.embed_dim // 16,
      num_kv_heads=self.embed_dim // 16,
      head_dim=16,
      mlp_dim=2 * self.embed_dim,
      max_seq_len=self.seq_len,
    )


@dataclasses.dataclass(frozen=True)
class Space:
  """What is tuned of an optimizer: two numbers, whichever it is.

  Attributes:
    name: File in jaxtrain/optimizers/, or an optax transformation.
    rate: Learning rate in the middle of the range at 8 rows, see `trials`.
    kwargs: Arguments that are not tuned.
    momentum: Name of the argument that 1 - b1 is drawn for.
    mean_square: Whether its update wants the squares of the groups' gradients.
  """

  name: str
  rate: float
  kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  momentum: str = 'b1'
  mean_square: bool = False


_ADAM = dict(b2=0.95, weight_decay=0.1)
SPACES = {
  'nesterov': Space('optax.sgd', 0.1, dict(nesterov=True), 'momentum'),
  'adamw': Space('adamw', 4e-3, _ADAM),
  'lamb': Space('lamb', 1e-2, _ADAM),
  'muon': Space('muon', 4e-3, _ADAM, 'momentum'),
  'vr_adam': Space('vrgd', 8e-3, _ADAM | dict(base='adam'), mean_square=True),
  'vr_lamb': Space('vrgd', 2e-2, _ADAM | dict(base='lamb'), mean_square=True),
}


def trials(
  space: Space, batch_size: int, count: int, base_batch: int = 8
) -> list[dict[str, float]]:
  """The hyper-parameters to try: as many for every optimizer and batch size.

  Learning rates are log-uniform over two decades whose middle grows with the
  square root of the batch size; 1 - b1 over 0.02 to 0.3. The points are a
  Halton sequence: as even as so few can be, and a longer search begins with a
  shorter one.
  """
  middle = space.rate * math.sqrt(batch_size / base_batch)
  return [
    dict(
      learning_rate=middle * 10 ** (2 * _halton(i, 2) - 1),
      momentum=1 - 0.02 * 15 ** _halton(i, 3),
    )
    for i in range(1, count + 1)
  ]


def _halton(i, base):
  value, fraction = 0.0, 1.0
  while i:
    fraction /= base
    value += fraction * (i % base)
    i //= base
  return value


@functools.lru_cache(maxsize=1)
def corpus() -> tuple[np.ndarray, np.ndarray]:
  """Bytes of the standard library's sources: to train on, and held out."""
  tokenizer = load_tokenizer('byte')
  splits = []
  for split in ('train', 'validation'):
    documents = data.get('stdlib')(split=split, include_tests=False)
    found = tokenize(documents, tokenizer)
    tokens = found.tokens
    splits.append(np.where(tokens == found.gap, 0, tokens).astype(np.int32))
  return tuple(splits)


class Program:
  """Training with one optimizer at one batch size, compiled once.

  Args:
    task: What is trained.
    space: The optimizer.
    batch_size: Rows of a batch; a multiple of `task.groups`.

  Raises:
    ValueError: A batch that is no multiple of the groups.
  """

  def __init__(self, task: Task, space: Space, batch_size: int):
    if batch_size % task.groups:
      raise ValueError(
        f'{batch_size=} does not divide into {task.groups} groups'
      )
    self.task, self.space, self.batch_size = task, space, batch_size
    self._model = Transformer(task.model)
    self._mesh, self._rules = make_mesh(''), PRESETS['default']
    train, held_out = corpus()
    self._train = jnp.asarray(train)
    rows = np.linspace(
      0, len(held_out) - task.seq_len - 1, _EVAL_ROWS, dtype=int
    )
    self._eval = jnp.asarray(
      np.stack([held_out[r : r + task.seq_len + 1] for r in rows])
    )
    self.start = jax.jit(self._start)
    self.advance = jax.jit(self._advance, donate_argnums=0)
    self.evaluate = jax.jit(self._evaluate)

  def _tx(self, h):
    warmup = max(
      1, round(self.task.warmup * self.task.tokens / self.tokens_per_step)
    )
    rate = lambda count: (
      h['learning_rate'] * jnp.minimum(1.0, (count + 1) / warmup)
    )
    tuned = {self.space.momentum: h['momentum']}
    make = optimizers.get(self.space.name)
    return optax.with_extra_args_support(
      make(rate, **{**self.space.kwargs, **tuned})
    )

  @property
  def tokens_per_step(self) -> int:
    return self.batch_size * self.task.seq_len

  def _start(self, h, seed):
    tokens = jnp.zeros((1, self.task.seq_len), jnp.int32)
    params = nn.unbox(self._model.init(jax.random.key(seed), tokens)['params'])
    return dict(
      params=params,
      average=jax.tree.map(jnp.copy, params),
      opt_state=self._tx(h).init(params),
      step=jnp.int32(0),
      noise=jnp.zeros(2),
    )

  def _loss(self, params, rows):
    """Mean over the rows' tokens."""
    b, t = rows.shape[0], rows.shape[1] - 1
    batch = dict(
      tokens=rows[:, :-1],
      targets=rows[:, 1:],
      positions=jnp.broadcast_to(jnp.arange(t), (b, t)),
      segment_ids=jnp.ones((b, t), jnp.int32),
      weights=jnp.ones((b, t)),
    )
    total, _ = train_step.loss_sums(
      self._model,
      params,
      batch,
      jax.random.key(0),
      mesh=self._mesh,
      rules=self._rules,
    )
    return total / (b * t)

  def _evaluate(self, state):
    return self._loss(state['average'], self._eval)

  def _advance(self, state, h, seed, steps):
    return jax.lax.fori_loop(
      0, steps, lambda _, s: self._step(s, h, seed), state
    )

  def _step(self, state, h, seed):
    key = jax.random.fold_in(jax.random.key(seed), state['step'])
    last = self._train.shape[0] - self.task.seq_len - 1
    at = jax.random.randint(key, (self.task.groups, self.group), 0, last)
    rows = self._train[at[..., None] + jnp.arange(self.task.seq_len + 1)]
    params = state['params']
    grads = jax.vmap(jax.grad(self._loss), (None, 0))(params, rows)
    mean = jax.tree.map(lambda g: g.mean(axis=0), grads)
    noise = jnp.stack([_square(grads) / self.task.groups, _square(mean)])
    clip = 1 / jnp.maximum(jnp.sqrt(noise[1]), 1)
    extra = {}
    if self.space.mean_square:
      square = lambda g: jnp.mean((clip * g) ** 2, axis=0)
      extra['mean_square'] = jax.tree.map(square, grads)
    mean = jax.tree.map(lambda g: clip * g, mean)
    updates, opt_state = self._tx(h).update(
      mean, state['opt_state'], params, **extra
    )
    params = optax.apply_updates(params, updates)
    step = state['step'] + 1
    share = (_AVERAGE_POWER + 1) / (step + _AVERAGE_POWER)
    return dict(
      params=params,
      average=jax.tree.map(
        lambda a, p: a + share * (p - a), state['average'], params
      ),
      opt_state=opt_state,
      step=step,
      noise=state['noise'] + noise,
    )

  @property
  def group(self) -> int:
    """Rows of a group."""
    return self.batch_size // self.task.groups


def _square(tree):
  return sum(jnp.vdot(x, x) for x in jax.tree.leaves(tree))


def eval_steps(task: Task, batch_size: int) -> list[int]:
  """Steps after which is evaluated, `tokens` one of them."""
  each = batch_size * task.seq_len
  budget = max(1, task.tokens // each)
  last = budget * task.longer
  # A twelfth of the budget at first, then in even ratios.
  ratio = 12 ** (1 / max(task.evals - 1, 1))
  found, at = set(), budget / 12
  while at < last * 0.999:
    found.add(max(1, round(at)))
    at *= ratio
  return sorted(found | {budget, int(last)})


def run(
  program: Program,
  h: Mapping[str, float],
  seed: int,
) -> dict[str, Any]:
  """Runs one trial.

  Args:
    program: Of its optimizer and batch size.
    h: Its 'learning_rate' and 'momentum'.
    seed: Of parameters and batches.

  Returns:
    'curve': [step, held-out loss] pairs; 'noise': [step, mean square of the
    gradient of a group, of the batch] of the steps since the last; 'diverged'.
  """
  task = program.task
  budget = max(1, task.tokens // program.tokens_per_step)
  h = {k: jnp.float32(v) for k, v in h.items()}
  state = program.start(h, seed)
  steps, curve, noise, done = eval_steps(task, program.batch_size), [], [], 0
  before = np.zeros(2)
  for step in steps:
    state = program.advance(state, h, seed, step - done)
    loss, total = jax.device_get((program.evaluate(state), state['noise']))
    done_now = step - done
    done = step
    if not math.isfinite(loss):
      break
    curve.append([step, round(float(loss), 5)])
    noise.append([step, *((total - before) / done_now).tolist()])
    before = total
    if step >= budget and loss <= task.target:
      break
  diverged = not curve or curve[-1][0] != done
  return dict(curve=curve, noise=noise, diverged=diverged)


def records(path: str | os.PathLike) -> list[dict[str, Any]]:
  """What a file of JSON lines holds; a torn last line is left out."""
  path = pathlib.Path(path)
  found = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      found.append(json.loads(line))
    except json.JSONDecodeError:
      continue
  return found


def append(path: str | os.PathLike, record: Mapping[str, Any]) -> None:
  """Adds a record, on a line of its own even behind a torn one."""
  path = pathlib.Path(path)
  torn = path.exists() and path.read_bytes()[-1:] not in (b'\n', b'')
  with path.open('a') as f:
    f.write('\n' * torn + json.dumps(record) + '\n')


def key(record: Mapping[str, Any]) -> tuple[Any, ...]:
  """What makes two records the same trial."""
  fields = ('task', 'optimizer', 'batch_size', 'trial', 'seed')
  return tuple(json.dumps(record[f], sort_keys=True) for f in fields)


def task_key(task: Mapping[str, Any]) -> str:
  """What makes two records of the same task."""
  return json.dumps(task, sort_keys=True)


def planned(
  task: Task, names: list[str], batch_sizes: list[int], count: int, seed: int
) -> Iterator[dict[str, Any]]:
  """The trials of a search, without their results."""
  for name in names:
    for batch_size in batch_sizes:
      for i, h in enumerate(trials(SPACES[name], batch_size, count)):
        yield dict(
          task=dataclasses.asdict(task),
          optimizer=name,
          batch_size=batch_size,
          trial=i,
          seed=seed,
          **h,
        )
