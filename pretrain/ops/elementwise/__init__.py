"""Elementwise operations, fused on GPUs."""
