"""Paged KV cache: pages on the device, their allocation on the host."""
