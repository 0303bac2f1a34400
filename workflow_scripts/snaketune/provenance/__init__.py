"""Lineage: the tree of records behind a result, and checks of the files against their recorded digests."""
