"""Fit a law: Huber loss, linear parameters in closed form, bounded search from many starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.optimize import minimize, nnls

from evals.scaling.determined import undetermined
from evals.scaling.model_error import ModelError, model_error_from_json
from evals.scaling.parameters import Array, Law, named
from pretrain.common.errors import UserError
from pretrain.common.files import write_json

Residual = Literal["relative", "log"]
HUBER = 1e-3
# Logged losses of a run are not independent: where priors are weighed against them, this many count
# as one.
CORRELATED = 20
COLLINEAR = 1e-11  # share of the largest eigenvalue below which columns are one another's sums
LAST = 3  # logged losses that make up a curve's end


@dataclass
class Options:
    """Options of a fit.

    residual: ``relative`` (predicted / logged - 1) or ``log``; huber: the residual beyond which the
    loss is linear; starts: at most this many; priors: whether to use the law's.
    """

    residual: Residual = "relative"
    huber: float = HUBER
    starts: int | None = None
    priors: bool = True


@dataclass
class Start:
    """One local search: where it began and ended, and the objective there."""

    begun: dict[str, float]
    found: dict[str, float]
    objective: float
    converged: bool


@dataclass
class Fit:
    """A fitted law.

    theta: non-linear parameters in the space of the search; beta: linear ones; objective: mean
    Huber loss and priors; residuals: of the predicted loss, one array per curve; intervals:
    parameter -> (low, high), once bootstrapped; samples: (number, parameters) of the bootstrap,
    theta and beta concatenated; undetermined: parameter -> reason; domain: ranges of the fitted
    data; weights: (n,) of all losses; standard_errors: parameter -> standard error, in the space of
    the search, to first order, by data and priors; error: of the law itself, once bootstrapped.
    """

    law: Law
    theta: Array
    beta: Array
    objective: float
    residuals: list[Array]
    names: list[str]
    starts: list[Start]
    options: Options = field(default_factory=Options)
    undetermined: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    samples: Array | None = None
    domain: dict[str, Any] = field(default_factory=dict)
    weights: Array = field(default_factory=lambda: np.ones(1))
    standard_errors: dict[str, float] = field(default_factory=dict)
    error: ModelError | None = None

    @property
    def values(self) -> dict[str, float]:
        """The parameters' values by name."""
        found = named(self.law.nonlinear, self.theta)
        return found | named(self.law.linear, self.beta)

    def predict(self, data: Any) -> Array:
        """Return the predicted loss (n,) at a curve's logged steps, or of points."""
        return self.law.loss(self.theta, self.beta, self.law.prepared(data))

    def predict_samples(self, data: Any) -> Array:
        """Return a prediction (samples, n) per sample of the bootstrap, with the law's own error.

        Raises UserError where there are none.
        """
        if self.samples is None:
            raise UserError("the fit has no intervals: fit with --bootstrap")
        prepared, k = self.law.prepared(data), len(self.theta)
        rows = np.stack([self.law.loss(row[:k], row[k:], prepared) for row in self.samples])
        return rows if self.error is None else rows * np.exp(-self.error.draw(data))

    def mape(self) -> dict[str, float]:
        """Return the mean absolute percentage error of every fitted curve."""
        pairs = zip(self.names, self.residuals, strict=True)
        return {name: 100 * float(np.abs(r).mean()) for name, r in pairs}

    def end_errors(self) -> dict[str, float]:
        """Return the error in percent of every fitted curve's last losses, with its sign."""
        pairs = zip(self.names, self.residuals, strict=True)
        return {name: 100 * float(r[-LAST:].mean()) for name, r in pairs}

    def to_json(self) -> dict[str, Any]:
        """Return the fit as it is written to a file, without residuals."""
        law = self.law
        return {
            "law": law.name,
            "title": law.title,
            "formula": law.formula,
            "source": law.source,
            "settings": law.settings(),
            "parameters": {
                p.name: {
                    "value": self.values[p.name],
                    "unit": p.unit,
                    "meaning": p.meaning,
                    "interval_95": self.intervals.get(p.name),
                    "undetermined": self.undetermined.get(p.name),
                    "standard_error": self.standard_errors.get(p.name),
                }
                for p in law.parameters
            },
            "derived": law.derived(self.values),
            "objective": self.objective,
            "residual": self.options.residual,
            "huber": self.options.huber,
            "mape_of_fitted": self.mape(),
            "end_error_of_fitted": self.end_errors(),
            "starts": [vars(s) for s in self.starts],
            "warnings": self.warnings,
            "domain": self.domain,
            "samples": None if self.samples is None else self.samples.tolist(),
            "model_error": None if self.error is None else self.error.to_json(),
        }

    def save(self, path: Path) -> None:
        """Write the fit to a JSON file."""
        write_json(path, self.to_json())


def load_fit(path: Path) -> Fit:
    """Read a file of :meth:`Fit.save`, which has no residuals; raises UserError for others."""
    from evals.scaling.laws import LAWS

    try:
        saved = json.loads(path.read_text())
        law: Law = LAWS[saved["law"]](**saved["settings"])
        entries = saved["parameters"].items()
        values = {name: entry["value"] for name, entry in entries}
        samples = saved["samples"]
        return Fit(
            law,
            np.array([p.to_search(values[p.name]) for p in law.nonlinear]),
            np.array([values[p.name] for p in law.linear]),
            saved["objective"],
            [],
            [],
            [Start(**s) for s in saved["starts"]],
            Options(saved["residual"], saved["huber"]),
            {n: e["undetermined"] for n, e in entries if e["undetermined"]},
            saved["warnings"],
            {n: tuple(e["interval_95"]) for n, e in entries if e["interval_95"]},
            None if samples is None else np.array(samples, dtype=float),
            saved.get("domain", {}),
            standard_errors={n: e["standard_error"] for n, e in entries if "standard_error" in e},
            error=model_error_from_json(saved.get("model_error")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a fit that this command wrote ({error})") from None


class Problem:
    """The concatenated data of a fit, and its objective as a function of theta alone."""

    def __init__(self, law: Law, prepared: Sequence[Any], options: Options) -> None:
        self.law, self.prepared, self.options = law, prepared, options
        self.loss = np.concatenate([p.loss for p in prepared])
        self.weights = weights_of(prepared)
        self.beta: Array | None = None
        priors = [p.prior if options.priors else None for p in law.nonlinear]
        self.center = np.array([p[0] if p else 0.0 for p in priors])
        self.precision = np.array([p[1] ** -2 if p else 0.0 for p in priors])
        # As the negative log-likelihood with a standard deviation of ``huber``, per point.
        self.weight = options.huber**2 * min(CORRELATED, len(self.loss)) / len(self.loss)

    def designs(self, theta: Array) -> tuple[Array, Array]:
        """Return :meth:`Law.design` of all data: (n, linear) and (len(theta), n, linear)."""
        found = [self.law.design(theta, p) for p in self.prepared]
        return np.concatenate([x for x, _ in found]), np.concatenate([d for _, d in found], axis=1)

    def residuals(self, predicted: Array) -> Array:
        """Return the residuals (n,) of a predicted loss."""
        ratio = predicted / self.loss
        if self.options.residual == "relative":
            return ratio - 1
        result: Array = np.log(np.maximum(ratio, 1e-12))
        return result

    def __call__(self, theta: Array) -> tuple[float, Array]:
        """Return the objective x 1e6 and its gradient; at the best beta its derivative is 0."""
        columns, derivatives = self.designs(theta)
        beta = self.solve(columns)
        predicted = columns @ beta
        residual = self.residuals(predicted)
        delta, size = self.options.huber, np.abs(residual)
        huber = np.where(size < delta, residual**2 / 2, delta * (size - delta / 2))
        value = (self.weights * huber).mean()
        slope = self.weights * np.clip(residual, -delta, delta) / len(residual)
        slope = slope / (self.loss if self.options.residual == "relative" else predicted)
        gradient = np.einsum("n,pnk,k->p", slope, derivatives, beta)
        apart = theta - self.center
        value += self.weight * (self.precision * apart**2).sum() / 2
        gradient = gradient + self.weight * self.precision * apart
        return 1e6 * float(value), 1e6 * gradient

    def solve(self, columns: Array) -> Array:
        """Find the best non-negative linear parameters by iteratively reweighted least squares."""
        beta = self.beta
        delta = self.options.huber
        weights = self.weights
        logs = self.options.residual == "log"
        for _ in range(100):
            if beta is not None:
                predicted = columns @ beta
                residual = self.residuals(predicted)
                weights = self.weights / np.maximum(1.0, np.abs(residual) / delta)
            if logs and beta is not None:
                # residual(new) ~ residual + columns (new - beta) / predicted
                scaled = columns / predicted[:, None]
                target = scaled @ beta - residual
            else:
                scaled, target = columns / self.loss[:, None], np.ones(len(self.loss))
            new = _least_squares(scaled, target, weights)
            if logs and (columns @ new <= 0).any():
                new = np.ones(columns.shape[1]) * self.loss.mean() if beta is None else beta
            done = beta is not None and np.abs(new - beta).max() <= 1e-10 * np.abs(new).max()
            beta = new
            if done:
                break
        assert beta is not None
        self.beta = beta
        return beta


def weights_of(prepared: Sequence[Any]) -> Array:
    """Return the weight (n,) of every loss, 1 on average.

    Every curve weighs the same, however often its loss was logged: what separates it from a law is
    the law's error, which more losses do not average out. Within a curve a step's weight grows with
    its number, because laws serve to predict where runs end. Points weigh the same.
    """
    weights = [np.ones(len(p.loss)) for p in prepared]
    for i, item in enumerate(prepared):
        step = getattr(item, "step", None)
        if step is not None and len(step) > 1:
            steps = np.asarray(step, dtype=float)
            weights[i] = steps * np.gradient(steps)
        weights[i] = weights[i] / weights[i].sum()
    every = np.concatenate(weights)
    result: Array = every / every.mean()
    return result


def _least_squares(columns: Array, target: Array, weights: Array) -> Array:
    """Solve for non-negative coefficients; of collinear columns the smallest ones."""
    root = np.sqrt(weights)
    weighted, goal = columns * root[:, None], target * root
    scale = np.sqrt((weighted**2).sum(axis=0))
    scale[scale == 0] = 1.0
    weighted = weighted / scale
    gram, right = weighted.T @ weighted, weighted.T @ goal
    values, vectors = np.linalg.eigh(gram)
    if values[0] > COLLINEAR * values[-1]:
        beta = np.linalg.solve(gram, right)
    else:
        kept = vectors[:, values > COLLINEAR * values[-1]]
        beta = kept @ ((kept.T @ right) / values[values > COLLINEAR * values[-1]])
    if (beta < -COLLINEAR * np.abs(beta).max()).any():
        beta = nnls(weighted, goal)[0]
    result: Array = np.maximum(beta, 0.0) / scale
    return result


def fit(law: Law, data: Sequence[Any], options: Options | None = None) -> Fit:
    """Fit ``law`` to curves, or to one set of points in a list.

    Raises UserError where there are fewer losses than parameters.
    """
    options = options or Options()
    prepared = [law.prepared(item) for item in data]
    count = sum(len(p.loss) for p in prepared)
    if count < len(law.parameters):
        raise UserError(
            f"{law.title} has {len(law.parameters)} parameters, but there are {count} losses to "
            "fit, expected at least as many"
        )
    problem = Problem(law, prepared, options)
    starts, best = [], None
    for begun in law.start_points()[: options.starts]:
        found = search(problem, begun)
        starts.append(
            Start(
                named(law.nonlinear, begun),
                named(law.nonlinear, found.x),
                float(found.fun) * 1e-6,
                bool(found.success),
            )
        )
        if best is None or found.fun < best.fun:
            best = found
    assert best is not None
    theta = np.asarray(best.x)
    columns, _ = problem.designs(theta)
    beta = problem.solve(columns)
    residual = problem.residuals(columns @ beta)
    edges = np.cumsum([len(p.loss) for p in prepared])[:-1]
    result = Fit(
        law,
        theta,
        beta,
        float(best.fun) * 1e-6,
        np.split(residual, edges),
        [item.name for item in data],
        starts,
        options,
        warnings=[],
        domain=_domain(data),
        weights=problem.weights,
    )
    for item in data:
        result.warnings += [f"{item.name}: {w}" for w in getattr(item, "warnings", [])]
    result.undetermined = undetermined(result, problem)
    return result


def search(problem: Problem, begun: Array) -> Any:
    """Minimize the objective from ``begun`` on, and return scipy's result."""
    law = problem.law
    problem.beta = None
    if not len(begun):
        value, _ = problem(begun)
        return type("Found", (), {"x": begun, "fun": value, "success": True})
    return minimize(
        problem,
        begun,
        jac=True,
        method="L-BFGS-B",
        bounds=law.bounds(),
        options={"maxiter": 300, "ftol": 1e-13, "gtol": 1e-8},
    )


def _domain(data: Sequence[Any]) -> dict[str, Any]:
    """Return the ranges of the fitted data, by which extrapolation is recognized."""
    curves = [c for c in data if hasattr(c, "lr")]
    if curves:
        sizes = [c.parameters for c in curves if c.parameters is not None]
        batches = {c.tokens_per_step for c in curves}
        return {
            "steps": [int(min(c.step[0] for c in curves)), int(max(c.step[-1] for c in curves))],
            "peak_lr": [min(c.peak for c in curves), max(c.peak for c in curves)],
            "parameters": [min(sizes), max(sizes)] if sizes else None,
            "tokens_per_step": batches.pop() if len(batches) == 1 else None,
            "curves": [c.name for c in curves],
        }
    points = data[0]
    ratio = points.tokens / points.parameters
    return {
        "tokens_per_parameter": [float(ratio.min()), float(ratio.max())],
        "parameters": [float(points.parameters.min()), float(points.parameters.max())],
        "tokens": [float(points.tokens.min()), float(points.tokens.max())],
        "flops": [float(points.flops.min()), float(points.flops.max())],
        "runs": list(points.names),
    }
