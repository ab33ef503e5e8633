"""Checkpoints: their format, and how they are written, checked and loaded."""
