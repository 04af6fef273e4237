"""A few small cases under NVIDIA's compute-sanitizer.

Errors of memcheck are failures. racecheck's are noted, no more: it may take
what TMA and barriers of transactions order for races (it "supports" barriers of
`cuda::barrier`, says its manual).
"""

import functools
import os
import re
import shutil
import subprocess
import sys

from experiments.benchmarks.gpu_record import Section

# The accepted ones of 16 bits are small, and have several tiles.
_CASES = (
  ('flash_attention', 'bf16'),
  ('ragged_paged_attention', 'bf16'),
  ('grouped_matmul', 'bf16'),
  ('quantized_matmul', 'w8a16'),
  ('rms_norm', 'bf16'),
  ('linear_cross_entropy', 'bf16'),
)
_TOOLS = ('memcheck', 'racecheck')
_SUMMARY = re.compile(
  r'ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard'
)
_LONGEST_S = 60.0
_DECLINED = 'NotImplementedError'


def run(section: Section) -> None:
  """A row for each case, with a contender for each tool."""
  program = shutil.which('compute-sanitizer')
  for tool in _TOOLS:
    for op, case in _CASES[:1] if section.smoke else _CASES:
      name = f'{op}: {_existing(op, case)}'
      if section.has(name, tool):
        continue
      if program is None:
        section.add(name, tool, skipped='compute-sanitizer is not on PATH')
      elif section.left_s < 1:
        section.add(name, tool, skipped='no time is left')
      else:
        limit = section.left_s + 60
        ours = tool == 'memcheck'
        with section.trying(name, tool, is_ours=ours, hang_s=limit):
          found = _run(section, program, tool, op, _existing(op, case))
          section.add(name, tool, **found)


@functools.cache
def _existing(op, case):
  """The case, or the first whose name has it, or the first."""
  from experiments.benchmarks import gpu_checks

  names = list(gpu_checks._cases(op))
  fitting = [n for n in names if n == case] + [n for n in names if case in n]
  return (fitting or names)[0]


def _run(section, program, tool, op, case):
  """Fields of the row."""
  command = [
    *(program, '--tool', tool, '--error-exitcode', '99'),
    *(sys.executable, '-m', 'experiments.benchmarks.gpu_checks'),
    *(op, case, section.implementation),
  ]
  # Each array in memory of its own: what is beyond it is noticed.
  env = os.environ | {'XLA_PYTHON_CLIENT_ALLOCATOR': 'platform'}
  limit = min(section.left_s, _LONGEST_S)
  try:
    done = subprocess.run(
      command, env=env, capture_output=True, text=True, timeout=limit
    )
  except subprocess.TimeoutExpired:
    return dict(skipped=f'not done in {limit:.0f} s')
  text = done.stdout + done.stderr
  if _DECLINED in text:
    return dict(skipped=text.strip().splitlines()[-1][:300])
  counts = [int(a or b) for a, b in _SUMMARY.findall(text)]
  if not counts:
    last = (text.strip().splitlines() or ['nothing'])[-1]
    return dict(skipped=f'{tool} did not report: {last[:200]}')
  if sum(counts):
    first = next((l for l in text.splitlines() if '=========' in l), '')
    wrong = tool == 'memcheck'
    return dict(error=f'{sum(counts)} reported: {first[:200]}', wrong=wrong)
  if done.returncode:
    tail = text.strip().splitlines()[-1][:200]
    return dict(error=f'status {done.returncode}: {tail}', wrong=True)
  return dict(errors=0)
