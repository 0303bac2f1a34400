"""What a run will take, before it is paid for: steps, tokens, memory, hours and disk."""
