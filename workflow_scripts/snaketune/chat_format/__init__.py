"""The chat format: from messages to turns and text."""
