"""Tokenize text into shards: ``python -m data_prep CONFIG``."""
