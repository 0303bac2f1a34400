"""Held-out loss, generations, and the report that lays them side by side."""
