"""From text to token ids and what is trained on. No torch."""
