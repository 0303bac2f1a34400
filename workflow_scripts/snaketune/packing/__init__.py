"""Pack plans: which documents go into which packed sequence (row), and in which order."""
