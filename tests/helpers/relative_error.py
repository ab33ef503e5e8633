"""How far two tensors are apart."""

from __future__ import annotations

from torch import Tensor


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||; NaN where either has one. Equal infinities are equal."""
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach().double()
    same = (found == expected) & expected.isinf()
    found, expected = found.masked_fill(same, 0), expected.masked_fill(same, 0)
    size, difference = expected.norm(), (found - expected).norm()
    return float(difference / size) if size > 0 else float(difference)
