"""Trained models: loading, scoring and generating."""
