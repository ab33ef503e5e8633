"""Text to token shards: ``python -m data_prep CONFIG``."""
