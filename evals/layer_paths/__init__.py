"""Search for layer paths at test time, with the controls that such a search needs.

``python -m evals paths RUN --task NAME``; see docs/depth.md.
"""
