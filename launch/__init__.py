"""Starting runs, and grids of runs."""
