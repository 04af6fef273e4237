"""Becomes another program that ends when the process that started it does.

python die_with_parent.py PARENT_PID PROGRAM ARGUMENTS...

A supervisor that is killed can end nobody, so Linux is asked to: the request
(prctl, PR_SET_PDEATHSIG) is made by the child itself and outlives `exec`, so no
Python has to run between fork and exec in a supervisor that has threads. The
request holds for the thread that started this, which must live as long.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent, *command):
  """Never returns."""
  libc = ctypes.CDLL(None, use_errno=True)
  if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
    raise OSError(ctypes.get_errno(), 'prctl(PR_SET_PDEATHSIG) failed')
  # It may have died before the request; then nobody will send the signal.
  if os.getppid() != int(parent):
    sys.exit(f'process {parent} has died')
  os.execvp(command[0], command)


if __name__ == '__main__':
  main(*sys.argv[1:])
