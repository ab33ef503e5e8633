"""Pieces that several ops are made of."""
