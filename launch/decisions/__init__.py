"""Decide between arms by runs that are started as the rule asks: ``python -m launch decide``."""
