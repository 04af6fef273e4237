"""Runs of `experiments.ghost_batch_norm`: the setting, and one training run.

The arms train the same network on the same images for the same epochs: a small
batch and a large one with ordinary batch normalization, and the large one in
virtual batches (Hoffer, Hubara and Soudry, https://arxiv.org/abs/1705.08741).
Deviations from the paper's training: the learning rate falls by two steps, and
gradients are given no noise; they are clipped where an arm says so.
"""

from collections.abc import Callable, Iterable, Iterator
import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import time

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtrain.data.images import Images
from jaxtrain.data.images import load_images
from jaxtrain.data.images import split_images
from jaxtrain.models.ghost_batch_norm import STATS
from jaxtrain.models.ghost_batch_norm import GhostBatchNorm
from jaxtrain.models.resnet import ResNet
from jaxtrain.optimizers import base

ARMS = ('small', 'large', 'ghost')
_EVAL_BATCH = 512


@dataclasses.dataclass(frozen=True)
class Setting:
  """What all arms share; runs of another setting are others.

  Attributes:
    images: Name of `jaxtrain.data.images`.
    pool: Side of the squares of pixels that are averaged beforehand.
    num_train: Images to train on; the large batch may be all of them.
    num_valid: Images that learning rates are chosen on.
    num_test: Images that accuracies are reported of.
    label_noise: Share of the training labels that are drawn at random, by the
      seed of the run.
    small_batch: Batch of the arm 'small'.
    large_batch: Batch of the others.
    ghost_size: Virtual batch of 'ghost'.
    epochs: Of every arm; the learning rate falls to a tenth after half of them
      and again after three quarters.
    momentum: Of SGD.
    weight_decay: Added to the gradient of matrices, times the weights.
    num_blocks: Of a stage of the network.
    widths: Channels of its stages.
    stem_stride: Of its first convolution.
    split_seed: Chooses the images of each part.
  """

  images: str = 'digits'
  pool: int = 1
  num_train: int = 512
  num_valid: int = 256
  num_test: int = 1029
  label_noise: float = 0.0
  small_batch: int = 32
  large_batch: int = 512
  ghost_size: int = 16
  epochs: int = 40
  momentum: float = 0.9
  weight_decay: float = 5e-4
  num_blocks: int = 1
  widths: tuple[int, ...] = (16, 32)
  stem_stride: int = 2
  split_seed: int = 0

  def __post_init__(self):
    for batch in (self.small_batch, self.large_batch):
      if batch < 1 or self.num_train % batch:
        raise ValueError(
          f'num_train={self.num_train} is not a multiple of the batch {batch}'
        )
    if self.ghost_size < 1 or self.large_batch % self.ghost_size:
      raise ValueError(
        f'large_batch={self.large_batch} is not a multiple of '
        f'ghost_size={self.ghost_size}'
      )
    if not 0 <= self.label_noise <= 1:
      raise ValueError(f'label_noise={self.label_noise} is not in [0, 1]')
    if min(self.epochs, self.pool) < 1:
      raise ValueError(f'epochs={self.epochs} or pool={self.pool} is below 1')

  def batch(self, arm: str) -> int:
    return self.small_batch if arm == 'small' else self.large_batch

  def learning_rate(self, arm: str, rate: float) -> float:
    """`rate` is of the small batch; others take equation 7's square root."""
    return rate * (self.batch(arm) / self.small_batch) ** 0.5

  def parts(self) -> tuple[Images, Images, Images]:
    """Images to train, to validate and to test on; mean 0, deviation 1."""
    found = load_images(self.images)
    n, h, w, c = found.images.shape
    if h % self.pool:
      raise ValueError(f'pool={self.pool} does not divide the {h} pixels')
    p = self.pool
    x = found.images.reshape(n, h // p, p, w // p, p, c).mean((2, 4))
    sizes = self.num_train, self.num_valid, self.num_test
    parts = split_images(Images(x, found.labels), *sizes, seed=self.split_seed)
    mean, std = parts[0].images.mean(), parts[0].images.std()
    return tuple(Images((i.images - mean) / std, i.labels) for i in parts)


Key = tuple[str, float, int]
Results = Iterator[tuple[Key, dict]]


@contextlib.contextmanager
def runner(
  setting: Setting, num_processes: int = 1
) -> Iterator[Callable[[Iterable[Key]], Results]]:
  """A function from (arm, rate, seed)s to pairs of these and what came of them.

  Results come as they are ready, with several processes in any order; each
  process compiles for itself, unless JAX's compilation cache is on.
  """
  if num_processes < 1:
    raise ValueError(f'num_processes={num_processes} is below 1')
  if num_processes == 1:
    run = make_run(setting)
    yield lambda keys: ((key, run(*key)) for key in keys)
    return
  with concurrent.futures.ProcessPoolExecutor(
    num_processes,
    multiprocessing.get_context('spawn'),
    initializer=_start,
    initargs=(setting,),
  ) as pool:

    def run_all(keys):
      futures = {pool.submit(_work, key): key for key in keys}
      try:
        for done in concurrent.futures.as_completed(futures):
          yield futures[done], done.result()
      finally:
        for future in futures:
          future.cancel()

    yield run_all


def _start(setting):
  global _run_here
  _run_here = make_run(setting)


def _work(key):
  return _run_here(*key)


@dataclasses.dataclass(frozen=True)
class Arm:
  """One way to train.

  Attributes:
    batch: Images of a step.
    ghost_size: Of virtual batches; `None` is ordinary batch normalization.
    rate_factor: Times the learning rate that is asked for.
    epochs: Of the training images.
    clip_norm: Largest norm of a gradient of all parameters.
  """

  batch: int
  epochs: int
  ghost_size: int | None = None
  rate_factor: float = 1.0
  clip_norm: float | None = None


def make_run(setting: Setting) -> Callable[[str, float, int], dict]:
  """`run(arm, rate, seed)`: trains once, returns accuracies."""
  train = make_training(setting)

  def run(arm: str, rate: float, seed: int) -> dict:
    how = Arm(
      setting.batch(arm),
      setting.epochs,
      setting.ghost_size if arm == 'ghost' else None,
      setting.learning_rate(arm, 1.0),
    )
    return train(how, rate, seed)

  return run


def make_training(setting: Setting) -> Callable[[Arm, float, int], dict]:
  """`train(arm, rate, seed)`: trains once, returns accuracies."""
  train, valid, test = setting.parts()
  # What is initialized, and what inference computes, depends on no batch.
  model = _model(setting, None)
  init = jax.jit(functools.partial(model.init, train=True))

  @functools.cache
  def made(ghost_size, clip_norm):
    tx = _optimizer(setting, clip_norm)
    return tx, _make_step(_model(setting, ghost_size), tx)

  def run(arm: Arm, rate: float, seed: int) -> dict:
    start = time.perf_counter()
    tx, step = made(arm.ghost_size, arm.clip_norm)
    rng = np.random.default_rng(seed)
    noisy = _with_noise(train.labels, setting.label_noise, rng)
    data = jnp.asarray(train.images), jnp.asarray(noisy)
    variables = nn.unbox(init(jax.random.key(seed), data[0][:1]))
    state = variables, tx.init(variables['params'])
    total = arm.epochs * (len(train) // arm.batch)
    peak = arm.rate_factor * rate
    for i in range(arm.epochs):
      order = rng.permutation(len(train)).reshape(-1, arm.batch)
      for j, index in enumerate(order):
        done = (i * len(order) + j) / total
        falls = (done >= 0.5) + (done >= 0.75)
        state, loss = step(state, data, index, peak * 0.1**falls)
    accuracy = functools.partial(_accuracy, model, state[0])
    return dict(
      test_accuracy=accuracy(test),
      valid_accuracy=accuracy(valid),
      train_accuracy=accuracy(Images(train.images, noisy)),
      last_loss=float(loss),
      seconds=round(time.perf_counter() - start, 2),
    )

  return run


def _optimizer(setting, clip_norm):
  clip = optax.identity()
  if clip_norm is not None:
    clip = optax.clip_by_global_norm(clip_norm)
  return optax.chain(
    clip,
    optax.add_decayed_weights(setting.weight_decay, base.decay_mask),
    # The learning rate comes after momentum, as in the authors' framework.
    optax.trace(setting.momentum),
  )


def _model(setting, ghost_size):
  return ResNet(
    functools.partial(GhostBatchNorm, ghost_size=ghost_size),
    num_blocks=setting.num_blocks,
    widths=setting.widths,
    stem_stride=setting.stem_stride,
  )


def _make_step(model, tx):
  """A step of SGD; `state` is the variables and what `tx` keeps."""

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, data, index, learning_rate):
    variables, kept = state
    images, labels = (x[index] for x in data)

    def loss_fn(params):
      logits, new = model.apply(
        {**variables, 'params': params}, images, train=True, mutable=[STATS]
      )
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return losses.mean(), nn.unbox(new)

    params = variables['params']
    (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, kept = tx.update(grads, kept, params)
    params = jax.tree.map(lambda p, u: p - learning_rate * u, params, updates)
    return ({'params': params, **new}, kept), loss

  return step


def _with_noise(labels, share, rng):
  """Labels of which `share` are drawn anew, among all classes."""
  chosen = rng.permutation(len(labels))[: round(share * len(labels))]
  noisy = labels.copy()
  noisy[chosen] = rng.integers(0, labels.max() + 1, len(chosen))
  return noisy


@functools.partial(jax.jit, static_argnums=0)
def _correct(model, variables, images, labels):
  logits = model.apply(variables, images, train=False)
  return jnp.sum(jnp.argmax(logits, -1) == labels)


def _accuracy(model, variables, images):
  correct = sum(
    int(
      _correct(
        model,
        variables,
        images.images[i : i + _EVAL_BATCH],
        images.labels[i : i + _EVAL_BATCH],
      )
    )
    for i in range(0, len(images), _EVAL_BATCH)
  )
  return correct / len(images)
