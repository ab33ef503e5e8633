"""Score trained models: ``python -m evals CHECKPOINT``."""
