"""Programs that train and serve: binaries, their configs, and benchmarks."""
