"""Chat data in the ftdp layout: messages, chat template, tokenised files, data order, packing (no torch in here)."""
