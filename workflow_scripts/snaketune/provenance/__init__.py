"""Where a result comes from: the tree of records behind a file, and whether the files still are what the records say."""
