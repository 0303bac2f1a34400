"""The network: loading a base model, growing it for a tokenizer, attention, LoRA and the loss."""
