r"""Cost of an optimizer's update, as a ratio to optax.adamw in the same run.

python -m experiments.benchmarks.optimizers
python -m experiments.benchmarks.optimizers --optimizers=lamb,lars --rounds=9

One update of all parameters of a transformer of 50 M, layers stacked, compiled
and donated, gradients random. Contenders take turns; a ratio is the median over
rounds of what an optimizer took over what optax.adamw took in that round. Bytes
are of optimizer state per parameter. Every update must be finite and must point
downhill.
"""

import json
import pathlib
import platform
import statistics
import sys
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import optax
import tqdm

from jaxtrain import optimizers
from jaxtrain.optimizers.wrappers.state_dtype import bytes_per_param

_RESULTS = pathlib.Path(__file__).parent / 'results' / 'optimizers_cpu.json'
_OPTIMIZERS = flags.DEFINE_list(
  'optimizers', None, 'All of jaxtrain/optimizers/ by default.'
)
_ROUNDS = flags.DEFINE_integer(
  'rounds', 7, 'Turns; fewer where they take long.', lower_bound=1
)
_EMBED_DIM = flags.DEFINE_integer(
  'embed_dim', 512, 'D, of 192 D^2 parameters; a multiple of 64.'
)
_OUTPUT = flags.DEFINE_string('output', str(_RESULTS), 'JSON.')

# Of an optimizer that wraps others, which ones.
_VARIANTS = {
  'vrgd': {f'vrgd {base}': dict(base=base) for base in ('lamb', 'adam', 'sgd')},
}
_LEARNING_RATE = 1e-3
# Turns end after so many, and so long.
_FEWEST, _LONG_S = 3, 20.0


def _shapes(d):
  """A Llama's of 192 D^2 parameters, layers stacked."""
  num_layers, f, vocab, heads = 8, 4 * d, 32 * d, (d // 64, 64)
  return {
    'embed': {'embedding': (vocab, d)},
    'layers': {
      'attention': {
        **{n: {'kernel': (num_layers, d, *heads)} for n in _PROJECTIONS},
        'out': {'kernel': (num_layers, *heads, d)},
      },
      'mlp': {
        'up': {'kernel': (num_layers, d, f)},
        'gate': {'kernel': (num_layers, d, f)},
        'down': {'kernel': (num_layers, f, d)},
      },
      'norm': {'scale': (num_layers, d)},
    },
    'unembed': {'kernel': (d, vocab)},
  }


_PROJECTIONS = ('query', 'key', 'value')


def _random(shapes, seed):
  leaves, tree = jax.tree.flatten(
    shapes, is_leaf=lambda x: isinstance(x, tuple)
  )
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  return jax.tree.unflatten(
    tree,
    [0.02 * jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)],
  )


class Contender:
  """An optimizer, its parameters and its state."""

  def __init__(self, name: str, tx: optax.GradientTransformation, shapes):
    self.name = name
    self._tx = optax.with_extra_args_support(tx)
    self.params = _random(shapes, 0)
    self.state = self._tx.init(self.params)
    self.bytes_per_param = bytes_per_param(tx, self.params)
    self._step = jax.jit(self._update, donate_argnums=(0, 1))

  def _update(self, params, state, grads, extra):
    updates, state = self._tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state

  def _extra(self, grads):
    if not self.name.startswith('vrgd'):
      return {}
    # As of groups whose gradients differ by as much as they have in common.
    square = jax.jit(lambda g: jax.tree.map(lambda x: 2 * x * x, g))
    return {'mean_square': jax.block_until_ready(square(grads))}

  def seconds(self, grads) -> float:
    """Of one step."""
    extra = self._extra(grads)
    start = time.perf_counter()
    self.params, self.state = jax.block_until_ready(
      self._step(self.params, self.state, grads, extra)
    )
    return time.perf_counter() - start

  def check(self, grads) -> None:
    """Whether a step goes downhill.

    Raises:
      AssertionError: It does not, or is not finite.
    """
    before = jax.tree.map(jnp.copy, self.params)
    self.seconds(grads)
    down = sum(
      jnp.vdot(g, new - old)
      for g, new, old in zip(
        *map(jax.tree.leaves, (grads, self.params, before)), strict=True
      )
    )
    if not down < 0:
      raise AssertionError(f'{self.name}: gradient times update is {down}')


def _contenders(shapes):
  names = _OPTIMIZERS.value or optimizers.names()
  if unknown := set(names) - set(optimizers.names()):
    raise ValueError(
      f'--optimizers={",".join(sorted(unknown))} unknown; known: '
      f'{", ".join(optimizers.names())}'
    )
  yield 'optax.adamw', optax.adamw(_LEARNING_RATE, weight_decay=0.01)
  for name in names:
    for variant, kwargs in _VARIANTS.get(name, {name: {}}).items():
      yield variant, optimizers.get(name)(_LEARNING_RATE, **kwargs)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  if _EMBED_DIM.value % 64 or _EMBED_DIM.value < 64:
    sys.exit(f'optimizers: --embed_dim={_EMBED_DIM.value} is no multiple of 64')
  shapes = _shapes(_EMBED_DIM.value)
  grads = _random(shapes, 1)
  size = sum(x.size for x in jax.tree.leaves(grads))
  rows = []
  try:
    plan = list(_contenders(shapes))
  except ValueError as e:
    sys.exit(f'optimizers: {e}')
  # One at a time beside adamw: all states at once would not fit.
  name, tx = plan[0]
  adamw = Contender(name, tx, shapes)
  adamw.check(grads)
  for name, tx in tqdm.tqdm(plan[1:], unit='optimizer'):
    rows.append(_compare(adamw, Contender(name, tx, shapes), grads))
  print(f'{size / 1e6:.1f} M parameters; optax.adamw: {_bytes(adamw)}')
  for row in sorted(rows, key=lambda r: r['ratio']):
    print(
      f'{row["name"]:12} {row["ratio"]:6.2f} x optax.adamw, '
      f'{row["bytes_per_param"]:.2f} bytes of state per parameter'
    )
  record = dict(
    parameters=size,
    rounds=_ROUNDS.value,
    rows=rows,
    versions=dict(
      python=platform.python_version(),
      jax=jax.__version__,
      optax=optax.__version__,
    ),
  )
  pathlib.Path(_OUTPUT.value).write_text(json.dumps(record, indent=1) + '\n')


def _bytes(contender):
  return f'{contender.bytes_per_param:.2f} bytes of state per parameter'


def _compare(adamw, contender, grads):
  contender.check(grads)
  ratios, seconds = [], []
  for i in range(_ROUNDS.value):
    if i >= _FEWEST and sum(seconds) > _LONG_S:
      break
    first, second = (adamw, contender) if i % 2 else (contender, adamw)
    times = {c.name: c.seconds(grads) for c in (first, second)}
    ratios.append(times[contender.name] / times[adamw.name])
    seconds.append(times[contender.name])
  return dict(
    name=contender.name,
    ratio=round(statistics.median(ratios), 3),
    ratio_min=round(min(ratios), 3),
    ratio_max=round(max(ratios), 3),
    rounds=len(ratios),
    ms=round(1e3 * statistics.median(seconds), 1),
    bytes_per_param=round(contender.bytes_per_param, 3),
  )


if __name__ == '__main__':
  app.run(main)
