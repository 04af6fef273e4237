"""Snapshots of a training state in the memory of other processes.

`snapshots.InMemorySnapshots` is what a trainer uses, `keeper` the process that
holds the bytes, and `reader` what a supervisor asks. Keepers and what they
import know no jax.
"""
