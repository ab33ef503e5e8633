"""Start runs, and grids of runs, on this machine or on Slurm: ``python -m launch CONFIG``."""
