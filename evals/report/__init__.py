"""``python -m evals report RUN...``: one self-contained page over runs and grids."""
