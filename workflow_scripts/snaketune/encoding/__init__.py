"""Encodes text as token ids and marks the trained ones. Does not import torch."""
