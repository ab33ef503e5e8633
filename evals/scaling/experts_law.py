"""The law of mixtures of experts: active and total parameters."""

from __future__ import annotations

import numpy as np

from evals.scaling.parameters import Array, Parameter
from evals.scaling.size_law import PreparedPoints, SizeLaw, excess


class ExpertsLaw(SizeLaw):
    """The joint law of dense models and mixtures of experts, with r = total / active parameters.

    L = E + A r^-delta N^-(alpha - gamma ln r) + B r^omega D^-(beta + zeta ln r), where N are the
    parameters that a token uses: the Chinchilla law for r = 1. More experts lower the first term,
    less so in larger models, and need more data.
    Source: Ludziejewski et al., arXiv 2502.05172, with r in place of their saturating number of
    experts.
    """

    name = "experts"
    title = "Mixture of experts"
    formula = "E + A r^-delta N^-(alpha - gamma ln r) + B r^omega D^-(beta + zeta ln r)"
    source = "arXiv 2502.05172"
    nonlinear = (
        Parameter("alpha", "", "exponent of active N", 0.02, 1.5, (0.2, 0.5)),
        Parameter("beta", "", "exponent of D", 0.02, 1.5, (0.2, 0.5)),
        Parameter("delta", "", "gain by more experts", -1.0, 2.0, (0.2,)),
        Parameter("gamma", "", "loss of that gain with N", -0.3, 0.3, (0.0,), prior=(0.0, 0.05)),
        Parameter("omega", "", "data that more experts need", -1.0, 2.0, (0.2,)),
        Parameter("zeta", "", "loss of that need with D", -0.3, 0.3, (0.0,), prior=(0.0, 0.05)),
    )
    linear = (Parameter("E", "nats", "irreducible loss"), excess("AN"), excess("BD"))

    def design(self, theta: Array, prepared: PreparedPoints) -> tuple[Array, Array]:
        """Return f (n, 3) and its derivatives (6, n, 3)."""
        alpha, beta, delta, gamma, omega, zeta = theta
        log_n, log_d = prepared.log_n, prepared.log_d
        log_r = prepared.log_total - prepared.log_n
        by_n = np.exp(-delta * log_r - (alpha - gamma * log_r) * log_n)
        by_d = np.exp(omega * log_r - (beta + zeta * log_r) * log_d)
        derivatives = np.zeros((6, len(log_n), 3))
        derivatives[0, :, 1] = -log_n * by_n
        derivatives[1, :, 2] = -log_d * by_d
        derivatives[2, :, 1] = -log_r * by_n
        derivatives[3, :, 1] = log_r * log_n * by_n
        derivatives[4, :, 2] = log_r * by_d
        derivatives[5, :, 2] = -log_r * log_d * by_d
        return np.stack([np.ones_like(by_n), by_n, by_d], axis=1), derivatives

    def derived(self, values: dict[str, float]) -> dict[str, float]:
        """Return A and B of dense models in raw units."""
        return {
            "raw A": values["A"] * self.size_reference ** values["alpha"],
            "raw B": values["B"] * self.token_reference ** values["beta"],
        }
