"""The tuned model in use: a conversation in the terminal, a plugin that it may call, and the commands that serve it."""
