"""A simulated cluster for the supervisor's policy to look after."""

import dataclasses

import pytest

from experiments.elastic.actions import Discard
from experiments.elastic.actions import Kill
from experiments.elastic.actions import Observation
from experiments.elastic.actions import Recovered
from experiments.elastic.actions import Start
from experiments.elastic.actions import Stop
from experiments.elastic.policy import Limits
from experiments.elastic.policy import Policy
from experiments.elastic.vitals import Patience
from jaxtrain.heartbeat import Beat

_LIMITS = Limits(
  settle_s=1, stop_s=50, regrow_after_s=100, max_restarts=5, backoff_s=1
)
_PATIENCE = Patience(hang_floor_s=20, hang_factor=10, slow_s=500, alive_s=10)


class World:
  """Simulated slots: they beat until told otherwise; tests spoil them.

  Every look takes a second, in which every loop makes a step.
  """

  limits = _LIMITS
  patience = _PATIENCE

  def __init__(self, num_slots=4, mesh='data=4', batch_size=12, **options):
    self.policy = Policy(
      mesh,
      num_slots=num_slots,
      devices_per_slot=options.pop('devices_per_slot', 1),
      batch_size=batch_size,
      limits=dataclasses.replace(_LIMITS, **options.pop('limits', {})),
      patience=dataclasses.replace(_PATIENCE, **options.pop('patience', {})),
      **options,
    )
    self.time_s = 0.0
    self.plan = None
    self.beats, self.exits = {}, {}
    self.frozen, self.stuck = set(), set()
    self.saved, self.best = None, 0
    self.healthy, self.stop = None, False
    self.log = []

  def look(self, seconds=1.0):
    """Lets time pass, then the policy see; returns what it does."""
    self.time_s += seconds
    self._live()
    done = self.policy.observe(
      Observation(
        self.time_s,
        dict(self.exits),
        dict(self.beats),
        self.saved,
        self.healthy,
        self.stop,
      )
    )
    for action in done:
      self.log.append(action)
      if isinstance(action, Start):
        self._start(action)
      elif isinstance(action, Kill):
        self.plan = None
      elif isinstance(action, Stop):
        self.end('SIGTERM')
      elif isinstance(action, Discard):
        self.saved = min(self.saved or 0, action.after_step)
    return done

  def until(self, kind, looks=2000):
    """Looks until an action of a kind, which is returned."""
    for _ in range(looks):
      for action in self.look():
        if isinstance(action, kind):
          return action
    raise AssertionError(f'no {kind.__name__}: {self.log}')

  def steps(self, count=3):
    """Lets so many seconds pass in which nothing is done."""
    for _ in range(count):
      done = self.look()
      assert not [a for a in done if not isinstance(a, Recovered)], done

  def end(self, why, code=0):
    for slot in self.plan.slots:
      self.beats[slot] = dataclasses.replace(self.beats[slot], ended=why)
      self.exits[slot] = code
    self.saved = self.beats[self.plan.slots[0]].step

  def fingerprint(self, **sums):
    """`s0='a'`: process 0 reports checksum a of the only group."""
    for name, value in sums.items():
      slot = int(name[1:])
      beat = self.beats[slot]
      prints = {beat.step: {'g': tuple(map(ord, value))}}
      self.beats[slot] = dataclasses.replace(
        beat, fingerprints={**beat.fingerprints, **prints}
      )

  def _start(self, plan):
    self.plan, self.exits = plan, {}
    self.frozen, self.stuck = set(), set()
    start = self.saved or 0
    self.beats = {
      s: Beat(step=start, first_step=start, phase='device') for s in plan.slots
    }

  def _live(self):
    """One step, unless somebody keeps the others waiting."""
    if self.plan is None:
      return
    waiting = self.frozen | self.stuck | set(self.exits)
    for slot in self.plan.slots:
      beat = self.beats[slot]
      if slot in self.frozen | set(self.exits):
        continue
      beat = dataclasses.replace(beat, alive=beat.alive + 1)
      if not waiting:
        beat = dataclasses.replace(beat, step=beat.step + 1, loop=beat.loop + 1)
      self.beats[slot] = beat


@pytest.fixture(scope='session')
def new_world():
  """Makes a world."""
  return World


@pytest.fixture
def world():
  """One of four slots that have made five steps."""
  world = World()
  assert world.look() == [Start((0, 1, 2, 3), 'data=4', 1)]
  world.steps(5)
  return world
