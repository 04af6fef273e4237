"""The mesh and the rules that map logical axes onto it.

The only package that names mesh axes.
"""

from jaxtrain.sharding.mesh import AXES
from jaxtrain.sharding.mesh import make_mesh
from jaxtrain.sharding.mesh import simulate_devices
from jaxtrain.sharding.partition import constrainer
from jaxtrain.sharding.partition import named_sharding
from jaxtrain.sharding.partition import param_shardings
from jaxtrain.sharding.partition import unsharded
from jaxtrain.sharding.redco import infer_rules
from jaxtrain.sharding.rules import PRESETS
from jaxtrain.sharding.rules import ShardingRules

__all__ = [
  'AXES',
  'PRESETS',
  'ShardingRules',
  'constrainer',
  'infer_rules',
  'make_mesh',
  'named_sharding',
  'param_shardings',
  'simulate_devices',
  'unsharded',
]
