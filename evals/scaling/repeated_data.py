"""The law of repeated data: what further epochs and further parameters are worth."""

from __future__ import annotations

import math

import numpy as np

from evals.scaling.parameters import Array, Parameter
from evals.scaling.size_law import PreparedPoints, SizeLaw


class DataConstrainedLaw(SizeLaw):
    """The Chinchilla law for repeated data: L = E + A N'^-alpha + B D'^-beta.

    U unique tokens are seen 1 + r times, each time with less value: D' = U (1 + R_D (1 - exp(-r /
    R_D))). Likewise parameters beyond U_N, the compute-optimal number for U tokens, lose theirs:
    N' = U_N (1 + R_N (1 - exp(-(N / U_N - 1) / R_N))). A and B enter U_N, so they are fitted as a
    sum S and A's share of it at the references. Both only let the loss level off: runs whose loss
    rises again with epochs or parameters are outliers.
    Source: Muennighoff et al., arXiv 2305.16264, eq. 5 and appendix A. Their R_D 15.39 and R_N 5.31
    are priors, to a factor of e: few tables say much about R_N.
    """

    name = "data_constrained"
    title = "Data-constrained"
    formula = "E + A N'^-alpha + B D'^-beta, D' = U (1 + R_D (1 - exp(-r/R_D))), N' likewise"
    source = "arXiv 2305.16264"
    nonlinear = (
        Parameter("alpha", "", "exponent of N", 0.02, 1.5, (0.35,)),
        Parameter("beta", "", "exponent of D", 0.02, 1.5, (0.35,)),
        Parameter(
            "R_D",
            "epochs",
            "value of unlimited repetition",
            0.1,
            1000.0,
            (4.0, 20.0),
            log=True,
            prior=(math.log(15.39), 1.0),
        ),
        Parameter(
            "R_N",
            "",
            "value of unlimited parameters",
            0.1,
            1000.0,
            (4.0, 20.0),
            log=True,
            prior=(math.log(5.31), 1.0),
        ),
        Parameter("share", "", "share of N in the excess", 1e-4, 1 - 1e-4, (0.3, 0.7)),
    )
    linear = (
        Parameter("E", "nats", "irreducible loss"),
        Parameter("S", "nats", "excess at the reference N and D"),
    )

    def design(self, theta: Array, prepared: PreparedPoints) -> tuple[Array, Array]:
        """Return f (n, 2) and its derivatives (5, n, 2)."""
        alpha, beta, share = theta[0], theta[1], theta[4]
        log_d, by_worth, _ = worth_of(prepared.log_unique, prepared.log_d, np.exp(theta[2]))
        # alpha A N^-alpha = beta B D^-beta where N and D are compute-optimal together.
        balance = np.log(alpha / beta) + np.log(share / (1 - share))
        log_u = (beta * prepared.log_unique + balance) / alpha
        log_n, by_excess, by_unit = worth_of(log_u, prepared.log_n, np.exp(theta[3]))
        from_n, from_d = share * np.exp(-alpha * log_n), (1 - share) * np.exp(-beta * log_d)
        derivatives = np.zeros((5, len(log_n), 2))
        d_unit = np.stack(  # of log_u by alpha, beta and the share
            [
                1 / alpha**2 - log_u / alpha,
                (prepared.log_unique - 1 / beta) / alpha,
                np.full_like(log_u, 1 / (share * (1 - share) * alpha)),
            ]
        )
        derivatives[[0, 1, 4], :, 1] = -alpha * from_n * by_unit * d_unit
        derivatives[0, :, 1] -= log_n * from_n
        derivatives[1, :, 1] -= log_d * from_d
        derivatives[2, :, 1] = -beta * from_d * by_worth
        derivatives[3, :, 1] = -alpha * from_n * by_excess
        derivatives[4, :, 1] += np.exp(-alpha * log_n) - np.exp(-beta * log_d)
        return np.stack([np.ones_like(from_n), from_n + from_d], axis=1), derivatives

    def derived(self, values: dict[str, float]) -> dict[str, float]:
        """Return A and B in raw units, and the compute-optimal N for a billion unique tokens."""
        alpha, beta, share = values["alpha"], values["beta"], values["share"]
        raw_a = values["S"] * share * self.size_reference**alpha
        raw_b = values["S"] * (1 - share) * self.token_reference**beta
        best = 0.0
        if raw_a > 0 and raw_b > 0:
            best = float((alpha * raw_a / (beta * raw_b) * 1e9**beta) ** (1 / alpha))
        return {"raw A": raw_a, "raw B": raw_b, "N for 1e9 unique tokens": best}


def worth_of(log_unit: Array, log_all: Array, limit: float) -> tuple[Array, Array, Array]:
    """Return log(u (1 + limit (1 - exp(-r / limit)))) for u = ``log_unit`` and r = all / u - 1.

    Where all is less than u it is all. The derivatives by log(limit) and by log u follow.
    """
    repeats = np.expm1(np.clip(log_all - log_unit, 0.0, 50.0))
    left = np.exp(-repeats / limit)
    factor = 1 + limit * (1 - left)
    inside = log_all > log_unit
    by_limit = np.where(inside, (limit * (1 - left) - repeats * left) / factor, 0.0)
    by_unit = np.where(inside, 1 - left * (repeats + 1) / factor, 0.0)
    return np.minimum(log_unit, log_all) + np.log(factor), by_limit, by_unit
