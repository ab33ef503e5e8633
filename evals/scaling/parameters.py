"""The parameters of a scaling law, and the interface of all laws."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a law.

    low, high: bounds, both reachable; starts: where the search begins, for a non-linear one; log:
    the search uses its logarithm; prior: its mean and standard deviation known from elsewhere, in
    the space of the search, or None; unit and meaning are shown to people.
    """

    name: str
    unit: str
    meaning: str
    low: float = 0.0
    high: float = math.inf
    starts: tuple[float, ...] = ()
    log: bool = False
    prior: tuple[float, float] | None = None

    def to_search(self, value: float) -> float:
        """Convert a value to the space of the search."""
        return math.log(value) if self.log else value

    def from_search(self, value: float) -> float:
        """Convert a value from the space of the search."""
        return math.exp(value) if self.log else value


class Law(ABC):
    """A law: loss = sum over j of beta_j f_j(theta), with few non-linear parameters theta.

    ``theta`` is in the space of the search (logarithms where :attr:`Parameter.log`). The linear
    parameters beta are non-negative and are solved for in closed form (variable projection).
    """

    name: ClassVar[str]
    title: ClassVar[str]
    formula: ClassVar[str]
    source: ClassVar[str]
    nonlinear: tuple[Parameter, ...]
    linear: tuple[Parameter, ...]

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """All parameters, the non-linear ones first."""
        return (*self.nonlinear, *self.linear)

    @abstractmethod
    def prepared(self, data: Any) -> Any:
        """Precompute from ``data`` (a curve, or points) all that is independent of the parameters.

        The result has an attribute ``loss`` (n,).
        """

    @abstractmethod
    def design(self, theta: Array, prepared: Any) -> tuple[Array, Array]:
        """Return f (n, number of linear parameters) and its derivatives (len(theta), n, ...)."""

    def loss(self, theta: Array, beta: Array, prepared: Any) -> Array:
        """Return the predicted loss (n,) in nats per token."""
        predicted: Array = self.design(theta, prepared)[0] @ beta
        return predicted

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments for this law."""
        return {}

    def derived(self, values: dict[str, float]) -> dict[str, float]:
        """Return quantities that follow from the parameters, such as published constants."""
        return {}

    def doubts(self, values: dict[str, float], prepared: Sequence[Any]) -> dict[str, str]:
        """Return parameters that data of this kind cannot determine at all, each with a reason."""
        return {}

    def start_points(self) -> list[Array]:
        """Return every combination of the parameters' starts, in the space of the search."""
        columns = [[p.to_search(s) for s in p.starts] for p in self.nonlinear]
        grids = np.meshgrid(*columns, indexing="ij") if columns else []
        return list(np.stack([g.ravel() for g in grids], axis=1)) if grids else [np.zeros(0)]

    def bounds(self) -> list[tuple[float, float]]:
        """Return the bounds of the non-linear parameters, in the space of the search."""
        return [(p.to_search(p.low), p.to_search(p.high)) for p in self.nonlinear]


def named(parameters: Sequence[Parameter], search: Array) -> dict[str, float]:
    """Return values by name, converted from the space of the search."""
    return {p.name: p.from_search(float(x)) for p, x in zip(parameters, search, strict=True)}
