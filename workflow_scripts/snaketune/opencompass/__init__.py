"""Public benchmarks by OpenCompass 0.5.4: its config from our settings, its run, and the scores."""
