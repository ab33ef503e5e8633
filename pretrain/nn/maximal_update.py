"""Maximal-update parametrization (Tensor Programs V, arXiv 2203.03466): one rule for all parameters.

A width m times that of the base model makes a matrix's inputs, its outputs or both m times as many.
Its start and its updates keep the size of what they do to activations where their spectral norms
are in proportion to sqrt(outputs / inputs) (arXiv 2310.17813). With n_in inputs, n_out outputs:

* A Gaussian of standard deviation s has the norm s sqrt(max(n_in, n_out)) up to a constant.
* AdamW's updates have elements of one size lr and are nearly of rank one: lr sqrt(n_in n_out). So
  lr falls as 1 / n_in.
* Muon's are orthogonal matrices times 0.2 sqrt(max(n_in, n_out)): elements of one size, but spread
  over all directions as in a Gaussian. Their multiple is therefore the Gaussian's.
"""

from __future__ import annotations

from typing import Literal

Role = Literal["input", "hidden", "output"]
"""What grows with the model: ``input``, at most the outputs (embeddings, vectors, convolutions,
matrices from or inside a head); ``hidden``, inputs and outputs; ``output``, the inputs alone
(routers, halting, projections to heads of a fixed number)."""


def start_multiple(role: Role, width: float) -> float:
    """Return the multiple of the initial values at ``width`` times the base model's width.

    It is also that of the learning rate of orthogonalised updates.
    """
    return {"input": 1.0, "hidden": width**-0.5, "output": 1 / width}[role]


def elementwise_lr_multiple(role: Role, width: float) -> float:
    """Return the multiple of the learning rate of updates whose elements are all of one size."""
    return 1.0 if role == "input" else 1 / width
