"""Evaluation on tasks of lm-evaluation-harness."""
