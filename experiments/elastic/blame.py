"""Which of several processes has failed, from what each of them shows.

When one process of a JAX program fails, all of them stop, and most of them die
of it. These are pure functions of exit codes, heartbeats and fingerprints.
"""

import collections
from collections.abc import Mapping
import signal

from experiments.elastic import exit_codes
from jaxtrain.heartbeat import Beat

# What nobody does to itself because of another process. SIGABRT is not among
# them: JAX's coordination service aborts those that have lost their peers.
_OWN_SIGNALS = frozenset(
  -s
  for s in (
    signal.SIGKILL,
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGILL,
    signal.SIGFPE,
    signal.SIGTERM,
    signal.SIGINT,
  )
)
# What a broken collective raises in those whose peer is gone.
_PEER_LOST = 'JaxRuntimeError'


def by_exits(
  exits: Mapping[int, int], errors: Mapping[int, str]
) -> frozenset[int]:
  """Processes that died of themselves.

  Those killed by a signal of their own; if there are none, those with an error
  that is not the loss of another process. A loss that is not finite and wrong
  arguments are nobody's fault: all processes see the same, and who has not yet
  said so dies of those that have.

  Args:
    exits: Exit codes, negative for signals.
    errors: Names of exceptions, of those that could tell.
  """
  failed = {slot: code for slot, code in exits.items() if code}
  if killed := [s for s, code in failed.items() if code in _OWN_SIGNALS]:
    return frozenset(killed)
  if {exit_codes.NON_FINITE, exit_codes.WRONG} & set(failed.values()):
    return frozenset()
  return frozenset(
    s
    for s, code in failed.items()
    if code != -signal.SIGABRT and errors.get(s) != _PEER_LOST
  )


def by_beats(beats: Mapping[int, Beat]) -> frozenset[int]:
  """Processes whose loop stands where the others' does not.

  Of loops that all stand still, most wait for another process: their phase is
  'device'. Those to blame have not come so far, or are behind by a step.
  Nobody, if that does not tell some from the others.
  """
  late = frozenset(s for s, b in beats.items() if b.phase != 'device')
  if not late:
    newest = max(b.step for b in beats.values())
    late = frozenset(s for s, b in beats.items() if b.step < newest)
  return late if len(late) < len(beats) else frozenset()


def by_fingerprints(
  reports: Mapping[int, Mapping[str, tuple[int, ...]]],
) -> tuple[bool, frozenset[int]]:
  """Whether copies of the parameters differ, and whose are the odd ones out.

  Args:
    reports: Process -> group of devices -> different checksums in the group,
      at one step.

  Returns:
    Whether any two differ, and the processes that hold what most others do
    not; nobody, if there is no majority.
  """
  # Its own devices contradict each other, whatever the others say.
  odd = {
    s for s, sums in reports.items() if any(len(v) > 1 for v in sums.values())
  }
  differ = bool(odd)
  groups = {group for sums in reports.values() for group in sums}
  for group in groups:
    votes = {
      s: sums[group][0]
      for s, sums in reports.items()
      if group in sums and s not in odd
    }
    counts = collections.Counter(votes.values())
    if len(counts) > 1:
      differ = True
      top, count = counts.most_common(1)[0]
      if 2 * count > len(votes):
        odd |= {s for s, value in votes.items() if value != top}
  return differ, frozenset(odd if len(odd) < len(reports) else ())
