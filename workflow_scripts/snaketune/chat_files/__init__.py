"""Files of conversations: the processed layout, lines, bad lines and their quarantine."""
