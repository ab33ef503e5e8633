"""Helpers that know nothing of models: errors, files, reading of settings, merging of metrics."""
