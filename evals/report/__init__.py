"""``python -m evals report RUN...``: one self-contained page about runs and grids."""
