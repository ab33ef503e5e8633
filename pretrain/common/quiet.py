"""Warnings of libraries on which nobody who trains could act."""

from __future__ import annotations

import os
import warnings

_WARNINGS = (
    ".*Transformer Engine and Apex are not installed.*",
    ".*Apex is not installed. Falling back to Torch Norm.*",
    ".*full scope is deprecated. Use empty cuda_graph_scope.*",
    ".*The .grad attribute of a Tensor that is not a leaf.*",
    ".*torch.distributed.(reduce_scatter_tensor|all_gather_into_tensor|_all_gather_base|"
    "_reduce_scatter_base)` is deprecated.*",
    ".*`load_state_dict` is deprecated and will be removed.*",
    # Parameters of two dtypes lie in separate buckets: neither order is the one of use.
    "The next bucket's parameter all-gather",
)


def ignore_warnings() -> None:
    """Ignore these warnings from now on; inside ``warnings.catch_warnings`` until it ends."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def quiet_process() -> None:
    """Keep libraries quiet in a process of our own: a command, never a user's program.

    They would also draw progress bars of fractions of a second between the lines of a log.
    """
    ignore_warnings()
    os.environ.setdefault("TQDM_DISABLE", "1")
