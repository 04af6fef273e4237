"""One layout that saves and restores, and a pair of them."""

import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain import optimizers
from jaxtrain import train_state
from jaxtrain import train_step
from jaxtrain.checkpoints import abstract
from jaxtrain.checkpoints import convert
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.config import MoE
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import make_mesh
from jaxtrain.sharding.partition import constrainer
from jaxtrain.train_state import TrainState

# Of the losses, between layouts.
TOLERANCE = 1e-6

# Name, which is the mesh, to the preset of rules.
LAYOUTS = {
  '': 'default',
  'data=8': 'data_parallel',
  'fsdp=8': 'fsdp',
  'tensor=8': 'tensor_parallel',
  'context=8': 'default',
  'data=2,expert=4': 'default',
  'stage=2,data=4': 'default',
  'data=2,fsdp=2,tensor=2': 'default',
  'fsdp=2,context=2,tensor=2': 'default',
  'stage=2,expert=2,tensor=2': 'default',
  'fsdp=2,tensor=2': 'default',
  'stage=2,context=2': 'default',
}
SAVED_AT = 2
_CONFIG = ModelConfig(
  vocab_size=64,
  embed_dim=16,
  num_layers=2,
  num_heads=8,
  num_kv_heads=8,
  head_dim=4,
  mlp_dim=32,
  max_seq_len=16,
  moe=MoE(num_experts=4, num_experts_per_token=2, mlp_dim=16),
)


class Layout:
  """One layout, its compiled step and its own run."""

  def __init__(self, name: str, folder: pathlib.Path):
    self.name = name
    self.folder = folder / (name or 'one')
    self.mesh = make_mesh(name)
    # 'stage' is nothing but the layers of the stack, split.
    self.rules = PRESETS[LAYOUTS[name]].replace(layers='stage')
    shard = constrainer(self.mesh, self.rules)
    model = Transformer(_CONFIG, shard=shard)
    tx = optimizers.get('adamw')(1e-2)
    self.spec = train_state.state_spec(model, tx, self.mesh, self.rules)
    self.init = functools.partial(
      train_state.init_state, model, tx, self.mesh, self.rules
    )
    self.step = train_step.make_train_step(model, tx, self.mesh, self.rules)
    self.losses: list[float] = []
    self.saved: dict[str, np.ndarray] = {}

  def train(self) -> None:
    """Makes steps, saves, and makes the two next."""
    state = self.init()
    for number in range(SAVED_AT):
      state, _ = self.step(state, self._batch(number))
    self.save(state)
    self.losses = self.next_losses(state)

  def save(self, state: TrainState) -> None:
    """Saves, and notes what has been saved."""
    self.saved = {
      n: np.array(x) for n, x in abstract.leaves(vars(state)).items()
    }
    with CheckpointManager(self.folder) as manager:
      manager.save(SAVED_AT, vars(state), config=_CONFIG)

  def random_state(self) -> TrainState:
    """A state of this layout, made without compiling anything."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
      lambda x: jax.device_put(
        (99 * rng.random(x.shape)).astype(x.dtype), x.sharding
      ),
      self.spec.abstract,
    )

  def next_losses(self, state: TrainState) -> list[float]:
    """Losses of the two steps after the checkpoint; uses `state` up."""
    losses = []
    for number in (SAVED_AT, SAVED_AT + 1):
      state, metrics = self.step(state, self._batch(number))
      losses.append(float(metrics['loss']))
    return losses

  def restored(self, folder: pathlib.Path) -> list[dict[str, Any]]:
    """The state of a checkpoint on this layout, by both readers."""
    target = vars(self.spec.abstract)
    with CheckpointManager(folder) as manager:
      whole, _, _ = manager.restore(target)
    return [whole, convert.restore(folder, [], target)]

  def _batch(self, number):
    rng = np.random.default_rng(number)
    tokens = rng.integers(0, _CONFIG.vocab_size, (8, 17)).astype(np.int32)
    values = dict(
      tokens=tokens[:, :-1],
      targets=tokens[:, 1:],
      positions=np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16)),
      segment_ids=np.ones((8, 16), np.int32),
      weights=np.ones((8, 16), np.float32),
    )
    shardings = train_step.batch_shardings(self.mesh, self.rules)
    return {
      k: jax.device_put(jnp.asarray(x), shardings[k]) for k, x in values.items()
    }


def is_same(state: Any, source: Layout, target: Layout) -> bool:
  """Whether a state has what was saved, bit for bit, on the target's shards."""
  wanted = abstract.leaves(vars(target.spec.abstract))
  found = abstract.leaves(state)
  if found.keys() != source.saved.keys():
    return False
  return all(
    x.dtype == source.saved[name].dtype
    and x.sharding.is_equivalent_to(wanted[name].sharding, x.ndim)
    and np.array_equal(_bits(x), _bits(source.saved[name]))
    for name, x in found.items()
  )


def pair(source: Layout, target: Layout) -> dict[str, Any]:
  """Restores what one layout saved on another, and goes on."""
  start = time.perf_counter()
  states = target.restored(source.folder)
  seconds = time.perf_counter() - start
  same = all(is_same(state, source, target) for state in states)
  losses = target.next_losses(TrainState(**states[-1]))
  difference = max(
    abs(x - y) / abs(y) for x, y in zip(losses, source.losses, strict=True)
  )
  return dict(
    source=source.name,
    target=target.name,
    same_bits=same,
    losses=losses,
    source_losses=source.losses,
    difference=difference,
    restore_s=round(seconds, 3),
  )


def _bits(x):
  return np.asarray(x).reshape(-1).view(np.uint8)
