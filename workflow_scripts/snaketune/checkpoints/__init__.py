"""Writes and reads the checkpoints of a training run."""
