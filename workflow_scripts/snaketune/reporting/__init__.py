"""Pages and tables: the report of a run, and comparisons of runs."""
