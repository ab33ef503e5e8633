"""Processes, collectives and what they need; nothing in here knows a model."""
