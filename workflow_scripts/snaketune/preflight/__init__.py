"""What is looked at before anything expensive starts: see preflight.py."""
