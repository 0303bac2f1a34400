"""Tokenised folders: what is written, how it is recorded, and how it is read back."""
