"""Checks before expensive jobs start (see preflight.py), and forecasts of memory, disk and time."""
