"""Processes, collectives and what they need; nothing here depends on a model."""
