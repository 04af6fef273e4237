"""Two processes of CPU devices that run one program together."""

import os
import pathlib
import socket
import subprocess
import sys

_ROOT = pathlib.Path(__file__).parents[3]
_JOIN = """
import sys
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', {devices})
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
address, index, *arguments = sys.argv[1:]
index = int(index)
jax.distributed.initialize(address, 2, index)
"""


def run(program, *arguments, devices=4, timeout_s=240):
  """What each of the two prints; both must end well.

  Args:
    program: Python; `index` is the number of its process, `arguments` a list.
    *arguments: Of the program.
    devices: Of each process.
    timeout_s: For each.
  """
  with socket.socket() as s:
    s.bind(('localhost', 0))
    address = f'localhost:{s.getsockname()[1]}'
  env = {**os.environ, 'PYTHONPATH': str(_ROOT)}
  env.pop('XLA_FLAGS', None)
  code = _JOIN.format(devices=devices) + program
  children = [
    subprocess.Popen(
      [sys.executable, '-c', code, address, str(i), *map(str, arguments)],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  outputs = []
  try:
    for child in children:
      out, err = child.communicate(timeout=timeout_s)
      assert child.returncode == 0, err[-4000:]
      outputs.append(out)
  finally:
    for child in children:
      child.kill()
  return outputs
