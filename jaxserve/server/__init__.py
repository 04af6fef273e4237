"""OpenAI-compatible HTTP over an `AsyncEngine`."""
