"""Merge checkpoints of a run into one of averaged weights."""
