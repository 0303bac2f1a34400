"""Reads, checks and merges the workflow's configuration (used by the Snakefile; needs neither torch nor Snakemake)."""
