"""Writes, records and reads tokenised folders."""
