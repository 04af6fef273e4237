"""From JSON to rules, and the two rules that need to know the target."""

from collections.abc import Mapping, Sequence
import dataclasses
import types
from typing import Any

import jax.numpy as jnp

from jaxtrain.checkpoints import remap_joins
from jaxtrain.checkpoints import remap_names
from jaxtrain.checkpoints import remap_rules


@dataclasses.dataclass(frozen=True)
class Init:
  """Leaves of the target that the checkpoint lacks: taken from a new state."""

  source: str


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Another optimizer: moments of the same name are carried, the rest is new.

  Names say which moments mean the same, as is true of AdamW, LAMB and Lion:
  'mu' is a mean of gradients, 'nu' one of their squares. Where it is not true,
  say so: the 'trace' of `optax.trace` is a sum, as a mean (1 - b1) times
  smaller, thus {'carry': {'trace': ['mu', 10.0]}} for b1 = 0.9; and what has
  the same name and another meaning is made new by {'carry': {'nu': null}}.

  Attributes:
    carry: From moments of the target to those of the checkpoint and a factor;
      `None` for a new one. Others come from those of the same name.
  """

  carry: Mapping[str, tuple[str, float] | None] = dataclasses.field(
    default_factory=dict
  )


RULES: Mapping[str, Any] = types.MappingProxyType(
  {
    'rename': remap_rules.Rename,
    'drop': remap_rules.Drop,
    'transpose': remap_rules.Transpose,
    'reshape': remap_rules.Reshape,
    'cast': remap_rules.Cast,
    'pad': remap_rules.Pad,
    'cut': remap_rules.Cut,
    'stack': remap_joins.Stack,
    'unstack': remap_joins.Unstack,
    'split': remap_joins.Split,
    'fuse': remap_joins.Fuse,
    'init': Init,
    'optimizer': Optimizer,
  }
)
# For serving: what is no parameter is left out.
PARAMS_ONLY = ({'rule': 'drop', 'from': r'/(?!params/).*'},)


def parse(rules: Sequence[Mapping[str, Any]]) -> list[Any]:
  """Rules as objects.

  Raises:
    ValueError: Names every rule that is unknown or wrong, and what is allowed.
  """
  if isinstance(rules, Mapping | str) or not isinstance(rules, Sequence):
    raise ValueError(f'rules must be a list of objects, not {rules!r}')
  parsed, faults = [], []
  for number, rule in enumerate(rules, 1):
    try:
      parsed.append(_parse(rule))
    except (TypeError, ValueError) as e:
      faults.append(f'rule {number} {rule!r}: {e}')
  if faults:
    raise ValueError('\n'.join(faults))
  return parsed


def _parse(rule):
  if not isinstance(rule, Mapping) or rule.get('rule') not in RULES:
    raise ValueError(f"'rule' is not one of {', '.join(RULES)}")
  kind = RULES[rule['rule']]
  fields = {f.name: f for f in dataclasses.fields(kind)}
  given = {
    'source' if key == 'from' else key: _frozen(value)
    for key, value in rule.items()
    if key != 'rule'
  }
  show = lambda names: ', '.join('from' if n == 'source' else n for n in names)
  if unknown := given.keys() - fields.keys():
    raise ValueError(f'unknown {show(unknown)}; allowed: {show(fields)}')
  none = dataclasses.MISSING
  needed = [
    n for n, f in fields.items() if f.default is f.default_factory is none
  ]
  if missing := [n for n in needed if n not in given]:
    raise ValueError(f'lacks {show(missing)}')
  for name, value in given.items():
    given[name] = _checked(name, value, fields[name].type)
  made = kind(**given)
  _check(made)
  return made


def _frozen(value):
  return tuple(value) if isinstance(value, list) else value


def _checked(name, value, kind):
  """A value of the type of its field."""
  item = {
    str: str,
    int: int,
    float: (int, float),
    tuple[str, ...]: str,
    tuple[int, ...]: int,
  }.get(kind)
  if item is None:
    return _carry(value)
  many = kind in (tuple[str, ...], tuple[int, ...])
  items = value if many and isinstance(value, tuple) else (value,)
  wrong = any(isinstance(x, bool) or not isinstance(x, item) for x in items)
  if wrong or many != isinstance(value, tuple):
    shown = 'from' if name == 'source' else name
    raise ValueError(f'{shown}={value!r} is not {kind}')
  return value


def _carry(value):
  if not isinstance(value, Mapping):
    raise ValueError(f'carry={value!r} is not an object')
  pairs = {}
  for new, old in value.items():
    pair = [old, 1.0] if isinstance(old, str) else old
    is_pair = isinstance(pair, list | tuple) and [type(x) for x in pair] in (
      [str, int],
      [str, float],
    )
    if pair is not None and not is_pair:
      raise ValueError(f'carry of {new!r} is no name, nor name and factor')
    pairs[new] = pair and (pair[0], float(pair[1]))
  return pairs


def _check(rule):
  """What is wrong with a rule by itself."""
  if isinstance(rule, Optimizer):
    return
  source, to = rule.source, getattr(rule, 'to', ())
  sources = source if isinstance(source, tuple) else (source,)
  tos = to if isinstance(to, tuple) else (to,)
  if len({s.startswith('/') for s in (*sources, *tos)}) > 1:
    raise ValueError("'from' and 'to' must both begin with '/', or neither")
  groups = min(remap_names.num_groups(s) for s in sources)
  if (needed := max(map(remap_names.num_references, tos), default=0)) > groups:
    raise ValueError(f"'to' needs {needed} groups, but 'from' has {groups}")
  _check_layer(rule, sources, tos)
  if isinstance(rule, remap_rules.Cast):
    try:
      is_float = jnp.issubdtype(jnp.dtype(rule.dtype), jnp.floating)
    except TypeError:
      is_float = False
    if not is_float:
      raise ValueError(f'dtype={rule.dtype!r} is not a dtype of floats')
  if isinstance(rule, remap_rules.Pad) and (
    (rule.size > 0) == (rule.multiple > 0)
  ):
    raise ValueError("give one of 'size' and 'multiple', above 0")
  if isinstance(rule, remap_joins.Split) and len(to) != len(rule.sizes):
    raise ValueError(f'{len(to)} names for {len(rule.sizes)} sizes')
  for name in ('groups', 'sizes'):
    values = getattr(rule, name, 1)
    values = values if isinstance(values, tuple) else (values,)
    if min(values) < 1:
      raise ValueError(f'{name}={getattr(rule, name)} must be at least 1')
  if isinstance(rule, remap_rules.Cut) and rule.size < 0:
    raise ValueError(f'size={rule.size} is negative')


def _check_layer(rule, sources, tos):
  has = lambda words: any(remap_names.LAYER in w for w in words)
  in_source = isinstance(rule, remap_joins.Stack)
  in_to = isinstance(rule, remap_joins.Unstack)
  for name, words, wanted in (('from', sources, in_source), ('to', tos, in_to)):
    if has(words) != wanted:
      what = 'lacks' if wanted else 'has'
      raise ValueError(f"'{name}' {what} {remap_names.LAYER}")
