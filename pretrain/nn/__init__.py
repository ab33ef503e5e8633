"""Layers of a language model, and the description of their parameters."""
