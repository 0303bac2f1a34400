"""Shared by all stages: atomic files, hashes, one-line errors, progress."""
