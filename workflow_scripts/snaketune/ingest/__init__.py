"""What people have (OpenAI messages, ShareGPT, Alpaca; JSON, JSONL, gzip, Zstandard, Parquet) to processed ftdp."""
