"""Optimizers as optax transformations: one file per paper.

`get('adamw')(learning_rate=1e-3)`. What they share is in `base.py`.
"""

import functools

from jaxtrain import registry

names = functools.partial(registry.names, __name__)
get = functools.partial(registry.get, __name__)
