"""Using the tuned model: a conversation in the terminal, a plugin for it to call, and commands to serve it."""
