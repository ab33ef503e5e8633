"""Maximal-update parametrization (Tensor Programs V, arXiv 2203.03466), by one rule for all.

A width m times the base model's makes a matrix's inputs, its outputs or both m times as many. What
it does to activations keeps its size where the spectral norms of the matrix and of its updates are
in proportion to sqrt(outputs / inputs) (arXiv 2310.17813). With n_in inputs and n_out outputs:

* A Gaussian of standard deviation s has the norm s sqrt(max(n_in, n_out)) up to a constant.
* AdamW's updates have elements of one size lr and are nearly of rank one: lr sqrt(n_in n_out). So
  lr falls as 1 / n_in.
* Muon's are orthogonal matrices times 0.2 lr sqrt(max(n_in, n_out)), which is the norm. Where both
  sides grow, lr falls as 1 / sqrt(m): the scaling by the shape has done the rest.
"""

from __future__ import annotations

from typing import Literal

Role = Literal["input", "hidden", "bottleneck", "output"]
"""What grows with the model:

* ``input``: at most the outputs. Embeddings, vectors, convolutions, matrices from a bottleneck or
  inside a head.
* ``hidden``: inputs and outputs.
* ``bottleneck``: the inputs alone, and the layer goes on with the outputs. Keys of one head for all
  heads, low-rank projections. Starting as the outputs of the limit do, at 0, would make what the
  layer computes from them vanish with the width, so they start as hidden ones.
* ``output``: the inputs alone, and the outputs are a result. Routers, halting.
"""


def start_multiple(role: Role, width: float) -> float:
    """Return the multiple of the initial values at ``width`` times the base model's width."""
    if role == "input":
        return 1.0
    return 1 / width if role == "output" else width**-0.5


def elementwise_lr_multiple(role: Role, width: float) -> float:
    """Return that of the learning rate where all elements of an update have one size (AdamW)."""
    return 1.0 if role == "input" else 1 / width


def orthogonal_lr_multiple(role: Role, width: float) -> float:
    """Return that of the learning rate of orthogonal updates scaled by their shape (Muon)."""
    if role == "input":
        return 1.0
    return width**-0.5 if role == "hidden" else 1 / width
