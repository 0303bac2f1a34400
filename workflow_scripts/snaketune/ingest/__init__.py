"""Converts OpenAI messages, ShareGPT and Alpaca (JSON, JSONL, gzip, Zstandard, Parquet) to processed ftdp."""
