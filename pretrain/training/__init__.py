"""Training: the trainer, its engine and callbacks, and what surrounds the steps of a run."""
