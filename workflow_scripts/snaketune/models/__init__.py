"""The network: loading a base, growing it to a tokenizer, attention, LoRA, the loss."""
