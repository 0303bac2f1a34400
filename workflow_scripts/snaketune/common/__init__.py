"""What every stage needs: atomic files, hashes, one-line errors, progress."""
