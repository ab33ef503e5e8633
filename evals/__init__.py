"""Score trained models: ``python -m evals CHECKPOINT``."""

import os

# Libraries would draw progress bars of fractions of a second between our lines.
os.environ.setdefault("TQDM_DISABLE", "1")
