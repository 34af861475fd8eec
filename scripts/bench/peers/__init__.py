"""Implementations for `worker.py`, one file a library; each is loaded in its own environment."""
