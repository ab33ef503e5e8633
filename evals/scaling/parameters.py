"""Parameters of a scaling law, and the interface that all laws share."""

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

    low, high: bounds, both reachable; starts: where the search begins, for one that enters
    non-linearly; log: searched as its logarithm; prior: (mean, standard deviation) of what is
    known of it from elsewhere, in the space of the search, or None; unit and meaning are shown.
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
        return math.log(value) if self.log else value

    def from_search(self, value: float) -> float:
        return math.exp(value) if self.log else value


class Law(ABC):
    """loss = sum over j of beta_j f_j(theta), with few non-linear parameters theta.

    ``theta`` is in the space of the search (logarithms where :attr:`Parameter.log`). The linear
    parameters beta are not negative and are solved for in closed form (variable projection).
    """

    name: ClassVar[str]
    title: ClassVar[str]
    formula: ClassVar[str]
    source: ClassVar[str]
    nonlinear: tuple[Parameter, ...]
    linear: tuple[Parameter, ...]

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (*self.nonlinear, *self.linear)

    @abstractmethod
    def prepared(self, data: Any) -> Any:
        """What of ``data`` (a curve, or points) does not depend on the parameters; it has
        ``loss`` (n,)."""

    @abstractmethod
    def design(self, theta: Array, prepared: Any) -> tuple[Array, Array]:
        """f (n, number of linear parameters) and its derivatives (len(theta), n, ...)."""

    def loss(self, theta: Array, beta: Array, prepared: Any) -> Array:
        """Predicted loss (n,), nats per token."""
        predicted: Array = self.design(theta, prepared)[0] @ beta
        return predicted

    def settings(self) -> dict[str, Any]:
        """What the constructor needs to make this law again."""
        return {}

    def derived(self, values: dict[str, float]) -> dict[str, float]:
        """Other quantities that follow from the parameters, such as the published constants."""
        return {}

    def doubts(self, values: dict[str, float], prepared: Sequence[Any]) -> dict[str, str]:
        """Parameters that data of this kind cannot determine, whatever the fit says, and why."""
        return {}

    def start_points(self) -> list[Array]:
        """Every combination of the parameters' starts, in the space of the search."""
        columns = [[p.to_search(s) for s in p.starts] for p in self.nonlinear]
        grids = np.meshgrid(*columns, indexing="ij") if columns else []
        return list(np.stack([g.ravel() for g in grids], axis=1)) if grids else [np.zeros(0)]

    def bounds(self) -> list[tuple[float, float]]:
        return [(p.to_search(p.low), p.to_search(p.high)) for p in self.nonlinear]


def named(parameters: Sequence[Parameter], search: Array) -> dict[str, float]:
    """The values by name, out of the space of the search."""
    return {p.name: p.from_search(float(x)) for p, x in zip(parameters, search, strict=True)}
