"""A plan of a run: its needs and its cost, computed from its settings before it is started."""
