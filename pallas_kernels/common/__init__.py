"""Shared by the ops: dispatch between backends."""
