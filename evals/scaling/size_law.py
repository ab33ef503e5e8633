"""The base of laws of the final loss: points as logarithms, in units of a law's references."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from evals.scaling.curves import Points
from evals.scaling.parameters import Array, Law, Parameter


@dataclass
class PreparedPoints:
    """Points with what does not depend on a law's parameters, as logarithms in its units.

    log_total: of the parameters with all experts, those of ``log_n`` where not given.
    """

    name: str
    loss: Array
    log_n: Array
    log_d: Array
    log_unique: Array
    log_c: Array
    log_total: Array


class SizeLaw(Law):
    """A law of size and data; N and D are in units of references, so that A and B are near 1."""

    def __init__(self, size_reference: float = 1.0, token_reference: float = 1.0) -> None:
        self.size_reference, self.token_reference = size_reference, token_reference

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments for this law."""
        return {"size_reference": self.size_reference, "token_reference": self.token_reference}

    def prepared(self, data: Points) -> PreparedPoints:
        """Convert points to logarithms in the law's units."""
        unique = data.tokens if data.unique_tokens is None else data.unique_tokens
        total = data.parameters if data.total_parameters is None else data.total_parameters
        return PreparedPoints(
            data.name,
            data.loss,
            np.log(data.parameters / self.size_reference),
            np.log(data.tokens / self.token_reference),
            np.log(np.minimum(unique, data.tokens) / self.token_reference),
            np.log(np.asarray(data.flops) / (6 * self.size_reference * self.token_reference)),
            np.log(total / self.size_reference),
        )


def excess(of: str) -> Parameter:
    """Return the linear parameter of an excess, such as ``AN``: A, the excess at N's reference."""
    return Parameter(of[0], "nats", f"excess at the reference {of[1:]}")
