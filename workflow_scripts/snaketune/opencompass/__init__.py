"""Public benchmarks with OpenCompass 0.5.4: renders its config from our settings, runs it and reads the scores."""
