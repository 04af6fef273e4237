"""Side-by-side measurements; every one checks its result first."""
