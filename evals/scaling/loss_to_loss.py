"""The law from one loss to another: of other data, or of models that were trained on other data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evals.scaling.curves import Points
from evals.scaling.parameters import Array, Law, Parameter
from pretrain.common.errors import UserError


class Pairs(Points):
    """Runs with two losses: ``source`` (n,) and ``loss`` (n,), the one that is predicted.

    The first takes the place of size and tokens, and runs with a lower one are further in training.
    Raises UserError for losses that are not positive.
    """

    def __init__(
        self, source: Array, loss: Array, names: Sequence[str] = (), name: str = "runs"
    ) -> None:
        source = np.asarray(source, dtype=float)
        bad = np.flatnonzero(~(np.isfinite(source) & (source > 0)))
        if len(bad):
            raise UserError(f"{name}: source holds {source[bad[0]]}, expected positive numbers")
        super().__init__(source, source, loss, flops=1 / source, names=names, name=name)

    @property
    def source(self) -> Array:
        """The first losses."""
        return self.parameters

    def only(self, keep: Any) -> Pairs:
        """Return the runs at the indices ``keep``."""
        keep = np.asarray(keep, dtype=int)
        names = [self.names[i] for i in keep]
        return Pairs(self.source[keep], self.loss[keep], names, self.name)


class LossToLossLaw(Law):
    """The shifted power law from one loss to another: L1 = E1 + K ((L0 - E0) / s)^kappa.

    Runs with equal first losses have equal second ones, whatever their size and data. s, the
    ``scale``, is a typical first loss, ``lowest`` the lowest. Losses far above E0 hardly determine
    it, and it is assumed to be 60 +- 10 % of the lowest; kappa is near 1 in the source.
    Source: Brandfonbrener et al., arXiv 2411.12925, eq. 5.
    """

    name = "loss_to_loss"
    title = "Loss to loss"
    formula = "E1 + K ((L0 - E0) / s)^kappa"
    source = "arXiv 2411.12925"
    nonlinear = (
        Parameter(
            "share",
            "",
            "E0 as a share of the lowest first loss",
            0.0,
            0.9,
            (0.3, 0.7),
            prior=(0.6, 0.1),
        ),
        Parameter("kappa", "", "exponent", 0.2, 4.0, (0.8, 1.2), prior=(1.0, 0.15)),
    )
    linear = (
        Parameter("E1", "nats", "second loss where the first is E0"),
        Parameter("K", "nats", "excess of the second loss at a first loss of E0 + s"),
    )

    def __init__(self, lowest: float = 1.0, scale: float = 1.0) -> None:
        self.lowest, self.scale = lowest, scale

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments for this law."""
        return {"lowest": self.lowest, "scale": self.scale}

    def prepared(self, data: Pairs) -> Pairs:
        """Return the pairs: nothing can be computed beforehand."""
        return data

    def design(self, theta: Array, prepared: Pairs) -> tuple[Array, Array]:
        """Return f (n, 2) and its derivatives (2, n, 2)."""
        share, kappa = theta
        rest = np.maximum(prepared.source - share * self.lowest, 1e-9) / self.scale
        column = rest**kappa
        derivatives = np.zeros((2, len(column), 2))
        derivatives[0, :, 1] = -kappa * column / rest * self.lowest / self.scale
        derivatives[1, :, 1] = column * np.log(rest)
        return np.stack([np.ones_like(column), column], axis=1), derivatives

    def derived(self, values: dict[str, float]) -> dict[str, float]:
        """Return E0."""
        return {"E0": values["share"] * self.lowest}


def loss_to_loss_law(pairs: Pairs) -> LossToLossLaw:
    """Return the law in units of the pairs; raises UserError for fewer than 5 first losses."""
    if len(np.unique(pairs.source)) < 5:
        raise UserError(
            f"{pairs.name}: there are {len(np.unique(pairs.source))} different first losses, "
            "expected at least 5"
        )
    return LossToLossLaw(float(pairs.source.min()), float(np.median(pairs.source)))
