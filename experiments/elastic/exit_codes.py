"""What the exit codes of a trainer and of its supervisor mean.

Both: 0 is a run that is finished.
"""

# Of `experiments.train_lm`. What it says of itself is not a reason to expel it.
WRONG = 2  # Arguments that do not fit together: the same again is no use.
NON_FINITE = 3  # The loss or the gradient is not finite, in all processes.

# Of `experiments.supervise`; 2 is the same as a trainer's.
GAVE_UP = 1  # Too many restarts in too short a time.
POISONED = 3  # The same step was not finite twice.
TOO_FEW = 4  # Too few processes are left, and none comes back.
STOPPED = 75  # A signal stopped it; the same command goes on from there.
