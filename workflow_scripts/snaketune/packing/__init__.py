"""Pack plans: which documents make which row, in which order."""
