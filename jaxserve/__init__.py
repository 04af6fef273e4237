"""Serving: a paged, continuously batched engine over the training model.

`LLM(path).generate(prompts)` is the face; see `jaxserve.llm`.
"""

import importlib

__all__ = ['EngineConfig', 'LLM', 'SamplingParams']
_HOME = {
  'EngineConfig': 'jaxserve.engine.config',
  'LLM': 'jaxserve.llm',
  'SamplingParams': 'jaxserve.engine.sampling_params',
}


def __getattr__(name):
  """Imports on first use: host policies must not pull in JAX."""
  if name not in _HOME:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(_HOME[name]), name)
