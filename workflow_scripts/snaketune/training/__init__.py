"""Trains a run, from its config to its record: an mmengine runner over DeepSpeed, on packed sequences."""
