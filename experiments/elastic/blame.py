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


def by_exits(exits: Mapping[int, int]) -> frozenset[int]:
  """Processes that died of themselves, by exit codes (negative: signals).

  Those killed by a signal of their own; if there are none, those that ended
  with an error and are not aborted; if there are none either, nobody. A loss
  that is not finite and wrong arguments are nobody's fault: all processes see
  the same, and who has not yet said so dies of those that have.
  """
  failed = {slot: code for slot, code in exits.items() if code}
  if killed := [s for s, code in failed.items() if code in _OWN_SIGNALS]:
    return frozenset(killed)
  if {exit_codes.NON_FINITE, exit_codes.WRONG} & set(failed.values()):
    return frozenset()
  return frozenset(s for s, c in failed.items() if c != -signal.SIGABRT)


def by_beats(beats: Mapping[int, Beat]) -> frozenset[int]:
  """Processes whose loop stands where the others' does not.

  Of loops that all stand still, one does not wait for the others: it is behind
  them, or in another phase, such as 'data'. Nobody, if that does not single
  out a minority.
  """
  places = {s: (b.step, b.phase) for s, b in beats.items()}
  counts = collections.Counter(places.values())
  top, count = max(counts.items(), key=lambda item: item[1])
  if 2 * count > len(places):
    return frozenset(s for s, place in places.items() if place != top)
  # Two processes: the one that is waiting for data keeps the other waiting.
  waiting = [s for s, b in beats.items() if b.phase == 'data']
  return frozenset(waiting if len(waiting) < len(beats) else ())


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
