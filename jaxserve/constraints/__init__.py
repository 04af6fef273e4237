"""Which tokens a schema or a regular expression allows: one file per method."""

import functools

from jaxtrain import registry

names = functools.partial(registry.names, __name__)
get = functools.partial(registry.get, __name__)
