"""How many tokens a request will generate: one file per predictor."""

import functools

from jaxtrain import registry

names = functools.partial(registry.names, __name__)
get = functools.partial(registry.get, __name__)
