"""Training data: tokenizers, prepared token shards, and batches of packed sequences."""
