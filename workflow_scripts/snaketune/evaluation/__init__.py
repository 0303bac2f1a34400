"""Held-out loss, generations and tool calls of base and tuned models."""
