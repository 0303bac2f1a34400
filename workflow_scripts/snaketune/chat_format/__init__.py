"""The chat format: messages to turns to text."""
