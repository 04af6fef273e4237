"""What the policy of the supervisor sees, and what it may ask for."""

from collections.abc import Mapping
import dataclasses

from jaxtrain.heartbeat import Beat


@dataclasses.dataclass(frozen=True)
class Observation:
  """What can be seen from outside the trainers, at one moment.

  A slot is a place for one process: a machine, or a number on this one.

  Attributes:
    time_s: From any clock that only goes forward.
    exits: Slot -> exit code (negative: signal) of the processes that have
      ended, of those started last.
    beats: Slot -> its heartbeat, where there is one.
    saved_step: Step of the newest checkpoint, if there is one.
    healthy: Lost slots that say they are well; `None` if nobody asks them.
    stop: Whether a signal has asked to stop.
  """

  time_s: float
  exits: Mapping[int, int] = dataclasses.field(default_factory=dict)
  beats: Mapping[int, Beat] = dataclasses.field(default_factory=dict)
  saved_step: int | None = None
  healthy: frozenset[int] | None = None
  stop: bool = False


@dataclasses.dataclass(frozen=True)
class Start:
  """Start one trainer in each of the slots, in this order, on a mesh."""

  slots: tuple[int, ...]
  mesh: str
  accumulation: int


@dataclasses.dataclass(frozen=True)
class Stop:
  """Ask the trainers to save and end."""

  why: str


@dataclasses.dataclass(frozen=True)
class Kill:
  """End what is left of the trainers at once.

  Attributes:
    why: Of what they died, or why they must.
    lost: Slots that are not to be used for now.
    step: Steps that had been made.
  """

  why: str
  lost: tuple[int, ...]
  step: int


@dataclasses.dataclass(frozen=True)
class Discard:
  """Take away what was saved after a step: it may be wrong."""

  after_step: int


@dataclasses.dataclass(frozen=True)
class Recovered:
  """The first step since `Start` is complete; nothing is to be done.

  Attributes:
    first_step: Steps that had been made when the trainers took over.
    lost_steps: Steps that had been made before, and must be made again.
    seconds: Since the trainers before them failed or were stopped; 0 for the
      first ones.
  """

  first_step: int
  lost_steps: int
  seconds: float


@dataclasses.dataclass(frozen=True)
class Finish:
  """Nothing more is to be done.

  Attributes:
    code: One of `exit_codes`.
    message: Why.
  """

  code: int
  message: str


Action = Start | Stop | Kill | Discard | Recovered | Finish
