r"""Searches the layouts of a training step on TPUs that need not be there.

python -m experiments.plan_for_tpu --preset=llama3-8b --topologies=v5e:4x4 \
    --batch_size=16 --seq_len=4096 --compilations=6 \
    --choices='{"mesh": ["fsdp=16", "fsdp=8,tensor=2"], "remat": ["full"]}'

Compiles every layout (minutes each for a large model), skips those that cannot
fit, and writes a Pareto table of memory against estimated time as JSON and as a
picture. Results are kept as they come: the same command goes on after an
interruption. Needs `pip install 'onemesh[tpu]'`, no TPU.
"""

import sys

from absl import app
from absl import flags

from experiments import layout_search
from pallas_kernels.tpu_compiler.plan import Budget

_PRESET = flags.DEFINE_string('preset', None, 'Published model, as llama3-8b.')
_TOPOLOGIES = flags.DEFINE_list('topologies', [], 'Such as v5e:4x4,v5p:2x2x2.')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 16, 'Rows of a step.')
_SEQ_LEN = flags.DEFINE_integer('seq_len', 4096, 'Tokens in a row.')
_CHOICES = flags.DEFINE_string(
  'choices',
  '{}',
  'JSON: values to try of mesh, rules, remat, accumulation, offload, '
  'batch_size, seq_len, dtype and param_dtype; all combinations, in this order.'
  ' A list of such objects tries those of each.',
)
_COMPILATIONS = flags.DEFINE_integer('compilations', None, 'At most so many.')
_SECONDS = flags.DEFINE_float('seconds', None, 'None begins after so long.')
_HBM_GIB = flags.DEFINE_float('hbm_gib', None, "Instead of the chip's memory.")
_AT_MOST = flags.DEFINE_integer('at_most', 1, 'Compilations at a time.')
_OUTPUT = flags.DEFINE_string(
  'output',
  'runs/plan',
  'Path without ending: .jsonl as they come, .json, .png.',
)
_CACHE_DIR = flags.DEFINE_string('cache_dir', None, 'Instead of ~/.cache.')
_TIMEOUT_S = flags.DEFINE_float('timeout_s', 3600.0, 'For one compilation.')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  try:
    if not _PRESET.value or not _TOPOLOGIES.value:
      raise ValueError('give --preset=, such as llama3-8b, and --topologies=')
    layout_search.run(
      _PRESET.value,
      _TOPOLOGIES.value,
      _CHOICES.value,
      _OUTPUT.value,
      batch_size=_BATCH_SIZE.value,
      seq_len=_SEQ_LEN.value,
      budget=Budget(_COMPILATIONS.value, _SECONDS.value, _HBM_GIB.value),
      at_most=_AT_MOST.value,
      cache_dir=_CACHE_DIR.value,
      timeout_s=_TIMEOUT_S.value,
    )
  except (ValueError, ModuleNotFoundError) as e:
    sys.exit(f'plan_for_tpu: {e}')


if __name__ == '__main__':
  app.run(main)
