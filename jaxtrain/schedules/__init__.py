"""Learning-rate schedules: one file per paper.

`get('warmup_cosine')(peak_value=1e-3, num_steps=1000, warmup_steps=100)`. The
interface is in `base.py`.
"""

import functools

from jaxtrain import registry

names = functools.partial(registry.names, __name__)
get = functools.partial(registry.get, __name__)
