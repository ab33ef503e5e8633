"""Scores of trained models: ``python -m evals CHECKPOINT``."""
