"""Where documents come from: one file per kind of source.

`get('jsonl')(files='data/*.jsonl')`. The interface is in `base.py`.
"""

import functools

from jaxtrain import registry

names = functools.partial(registry.names, __name__)
get = functools.partial(registry.get, __name__)
