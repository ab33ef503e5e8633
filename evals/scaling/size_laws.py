"""Laws of the final loss by model size and data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from evals.scaling.curves import Points
from evals.scaling.experts_law import ExpertsLaw
from evals.scaling.parameters import Array, Parameter
from evals.scaling.repeated_data import DataConstrainedLaw
from evals.scaling.size_law import PreparedPoints, SizeLaw, excess
from pretrain.common.errors import UserError


class ChinchillaLaw(SizeLaw):
    """The Chinchilla law: L = E + A N^-alpha + B D^-beta.

    Source: Hoffmann et al., arXiv 2203.15556, eq. 2 and appendix D.3; fitted as by Besiroglu et
    al., arXiv 2404.10102. :meth:`derived` gives A and B in raw units, where N = D = 1.
    """

    name = "chinchilla"
    title = "Chinchilla"
    formula = "E + A N^-alpha + B D^-beta"
    source = "arXiv 2203.15556, 2404.10102"
    nonlinear = (
        Parameter("alpha", "", "exponent of N", 0.02, 1.5, (0.2, 0.5, 0.9)),
        Parameter("beta", "", "exponent of D", 0.02, 1.5, (0.2, 0.5, 0.9)),
    )
    linear = (
        Parameter("E", "nats", "irreducible loss"),
        excess("AN"),
        excess("BD"),
    )

    def design(self, theta: Array, prepared: PreparedPoints) -> tuple[Array, Array]:
        """Return f (n, 3) and its derivatives (2, n, 3)."""
        alpha, beta = theta[:2]
        log_d = prepared.log_d
        by_n, by_d = np.exp(-alpha * prepared.log_n), np.exp(-beta * log_d)
        columns = np.stack([np.ones_like(by_n), by_n, by_d], axis=1)
        derivatives = np.zeros((2, len(by_n), 3))
        derivatives[0, :, 1] = -prepared.log_n * by_n
        derivatives[1, :, 2] = -log_d * by_d
        return columns, derivatives

    def derived(self, values: dict[str, float]) -> dict[str, float]:
        """Return A and B in raw units, and the compute-optimal exponent of N."""
        return {
            "raw A": values["A"] * self.size_reference ** values["alpha"],
            "raw B": values["B"] * self.token_reference ** values["beta"],
            "compute-optimal exponent of N": values["beta"] / (values["alpha"] + values["beta"]),
        }

    def optimum(self, values: dict[str, float], flops: Array) -> tuple[Array, Array]:
        """Return the N and D of the lowest loss for budgets of ``flops`` = 6 N D (eq. 4)."""
        alpha, beta = values["alpha"], values["beta"]
        raw = self.derived(values)
        scale = (alpha * raw["raw A"] / (beta * raw["raw B"])) ** (1 / (alpha + beta))
        n = scale * (np.asarray(flops) / 6) ** (beta / (alpha + beta))
        return n, np.asarray(flops) / (6 * n)


class KaplanLaw(SizeLaw):
    """The Kaplan law: L = ((N_c/N)^(alpha_N/alpha_D) + D_c/D)^alpha_D.

    It is written as L = scale (w N^(-alpha_N/alpha_D) + (1 - w) D^-1)^alpha_D, where ``scale`` is
    the loss at the references.
    Source: Kaplan et al., arXiv 2001.08361, eq. 1.5; :meth:`derived` gives N_c and D_c.
    """

    name = "kaplan"
    title = "Kaplan"
    formula = "((N_c/N)^(alpha_N/alpha_D) + D_c/D)^alpha_D"
    source = "arXiv 2001.08361"
    nonlinear = (
        Parameter("alpha_N", "", "exponent of N", 0.005, 1.0, (0.05, 0.2)),
        Parameter("alpha_D", "", "exponent of D", 0.005, 1.0, (0.05, 0.2)),
        Parameter("w", "", "share of the size at the references", 1e-6, 1 - 1e-6, (0.2, 0.8)),
    )
    linear = (Parameter("scale", "nats", "loss at the references"),)

    def design(self, theta: Array, prepared: PreparedPoints) -> tuple[Array, Array]:
        """Return f (n, 1) and its derivatives (3, n, 1)."""
        a, d, w = theta
        by_n, by_d = np.exp(-a / d * prepared.log_n), np.exp(-prepared.log_d)
        inner = w * by_n + (1 - w) * by_d
        column = inner**d
        slope = d * column / inner
        derivatives = np.zeros((3, len(column), 1))
        derivatives[0, :, 0] = -slope * w * by_n * prepared.log_n / d
        derivatives[1, :, 0] = column * np.log(inner) + slope * w * by_n * prepared.log_n * a / d**2
        derivatives[2, :, 0] = slope * (by_n - by_d)
        return column[:, None], derivatives

    def derived(self, values: dict[str, float]) -> dict[str, float]:
        """Return the published constants N_c and D_c."""
        a, d, w = values["alpha_N"], values["alpha_D"], values["w"]
        base = values["scale"] ** (1 / d)
        return {
            "N_c": self.size_reference * (base * w) ** (d / a),
            "D_c": self.token_reference * base * (1 - w),
        }


class ComputeLaw(SizeLaw):
    """The compute law: L = E + K C^-kappa, in the training FLOPs C alone.

    It is for runs of one family whose size and tokens were each chosen for their budget. K is the
    excess at C = 6 x both references.
    Source: Hestness et al., arXiv 1712.00409, with an irreducible loss (Henighan et al.,
    arXiv 2010.14701, eq. 1.1).
    """

    name = "compute"
    title = "Compute"
    formula = "E + K C^-kappa"
    source = "arXiv 1712.00409, 2010.14701"
    nonlinear = (Parameter("kappa", "", "exponent of C", 0.01, 1.0, (0.05, 0.2, 0.5)),)
    linear = (
        Parameter("E", "nats", "irreducible loss"),
        Parameter("K", "nats", "excess at the reference compute"),
    )

    def design(self, theta: Array, prepared: PreparedPoints) -> tuple[Array, Array]:
        """Return f (n, 2) and its derivatives (1, n, 2)."""
        by_c = np.exp(-theta[0] * prepared.log_c)
        derivatives = np.zeros((1, len(by_c), 2))
        derivatives[0, :, 1] = -prepared.log_c * by_c
        return np.stack([np.ones_like(by_c), by_c], axis=1), derivatives


SIZE_LAWS: dict[str, type[SizeLaw]] = {
    law.name: law for law in (ChinchillaLaw, KaplanLaw, DataConstrainedLaw, ExpertsLaw, ComputeLaw)
}


def size_law(name: str, points: Points) -> SizeLaw:
    """Return the law ``name`` with references in the middle of the points.

    Raises UserError where there are fewer than 3 sizes, numbers of tokens or budgets, or points
    lack what the law needs.
    """
    law = SIZE_LAWS[name]
    needed: list[tuple[str, Array, str]] = [
        ("parameters", points.parameters, "alpha"),
        ("tokens", points.tokens, "beta"),
    ]
    if name == "compute":
        needed = [("FLOPs", np.asarray(points.flops), "kappa")]
    for what, values, exponent in needed:
        if len(np.unique(values)) < 3:
            raise UserError(
                f"{points.name}: {len(np.unique(values))} different numbers of {what} do not "
                f"determine both {exponent} and the irreducible loss; expected at least 3"
            )
    if name == "data_constrained" and points.unique_tokens is None:
        raise UserError(f"{points.name}: the {law.title} law needs every run's unique_tokens")
    if name == "experts":
        if points.total_parameters is None:
            raise UserError(
                f"{points.name}: the {law.title} law needs every run's total_parameters, of all "
                "experts, beside the active ones"
            )
        ratios = np.round(points.total_parameters / points.parameters, 3)
        if len(np.unique(ratios)) < 3:
            raise UserError(
                f"{points.name}: {len(np.unique(ratios))} different ratios of total and active "
                "parameters do not determine what experts are worth; expected at least 3"
            )
    return law(
        float(np.exp(np.log(points.parameters).mean())), float(np.exp(np.log(points.tokens).mean()))
    )


def isoflop_profiles(points: Points, width: float = 0.1) -> list[dict[str, Any]]:
    """Fit a parabola of the loss in log N to each budget of at least 3 runs.

    Runs belong to one budget if their FLOPs agree within ``width``. Returns the N, D and loss at
    each minimum (arXiv 2203.15556, approach 2); ``inside`` is false where it lies outside the runs.
    Runs that repeat data or have experts have none: at one budget they differ in more than N.
    """
    unique, total = points.unique_tokens, points.total_parameters
    if unique is not None and (unique < 0.99 * points.tokens).any():
        return []
    if total is not None and (total > 1.01 * points.parameters).any():
        return []
    flops = np.asarray(points.flops)
    order = np.argsort(flops)
    groups: list[list[int]] = []
    for i in order:
        if groups and flops[i] <= flops[groups[-1][0]] * (1 + width):
            groups[-1].append(int(i))
        else:
            groups.append([int(i)])
    profiles = []
    for group in groups:
        logs, loss = np.log(points.parameters[group]), points.loss[group]
        if len(np.unique(logs)) < 3:
            continue
        curvature, slope, level = np.polyfit(logs - logs.mean(), loss, 2)
        if curvature <= 0:
            continue
        at = -slope / (2 * curvature)
        n, budget = math.exp(at + logs.mean()), float(flops[group].mean())
        profiles.append(
            {
                "flops": budget,
                "parameters": n,
                "tokens": float(
                    np.exp(
                        np.interp(at + logs.mean(), *_ascending(logs, np.log(points.tokens[group])))
                    )
                ),
                "loss": float(level + slope * at + curvature * at**2),
                "inside": bool(logs.min() <= at + logs.mean() <= logs.max()),
                "runs": [points.names[i] for i in group],
                "parabola": [float(curvature), float(slope), float(level), float(logs.mean())],
            }
        )
    return profiles


def frontier_exponents(profiles: list[dict[str, Any]]) -> dict[str, float]:
    """Return the exponents a, b of N ~ C^a and D ~ C^b over at least 2 minima within the runs."""
    rows = [p for p in profiles if p["inside"]]
    logs = np.log([p["flops"] for p in rows])
    return {
        "N": float(np.polyfit(logs, np.log([p["parameters"] for p in rows]), 1)[0]),
        "D": float(np.polyfit(logs, np.log([p["tokens"] for p in rows]), 1)[0]),
    }


def _ascending(x: Array, y: Array) -> tuple[Array, Array]:
    order = np.argsort(x)
    return x[order], y[order]
