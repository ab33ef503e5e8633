"""Scores of trained models: ``python -m evals CHECKPOINT``."""

import os

# Libraries draw progress bars of fractions of a second between our own lines.
os.environ.setdefault("TQDM_DISABLE", "1")
