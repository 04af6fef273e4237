"""What a request does to its logits before temperature and cuts."""

from jaxserve.samplers.processors.process import can_draw
from jaxserve.samplers.processors.process import process

__all__ = ['can_draw', 'process']
