"""A discrete-event simulator of the engine that runs the very same schedulers.

Host code, no JAX: a cost model stands for the device, and tokens have no
values. `simulator.simulate` runs a trace, `metrics.summary` judges it.
"""
