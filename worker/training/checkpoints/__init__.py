"""Checkpoints of a run: written, read back, kept and dropped."""
