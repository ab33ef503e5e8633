"""Loss curves with the learning rate of every step, and runs reduced to one point each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter1d

from evals.scaling.parameters import Array
from pretrain.common.errors import UserError


@dataclass
class Curve:
    """The loss curve of one run.

    step: (n,) int64, ascending, optimizer steps done at each logged loss; loss: (n,) nats per
    token; lr: (T,) learning rate of each optimizer step, T at least the last logged step; warmup:
    steps until the learning rate first stops rising; parameters: N, or None where not known;
    tokens_per_step, flops_per_token: None where not known; labels: the run's settings; warnings:
    what a reader of a fit should know; averaged: logged losses that each of ``loss`` is the mean
    of, on average. Raises UserError where no loss or not every rate is known.
    """

    name: str
    step: NDArray[np.int64]
    loss: Array
    lr: Array
    warmup: int
    parameters: float | None = None
    tokens_per_step: float | None = None
    flops_per_token: float | None = None
    labels: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    averaged: float = 1.0

    def __post_init__(self) -> None:
        if not len(self.step):
            raise UserError(f"{self.name}: there is no logged loss to fit")
        if len(self.lr) < self.step[-1]:
            raise UserError(
                f"{self.name}: the learning rate is known for {len(self.lr):,} steps, but the loss "
                f"is logged up to step {self.step[-1]:,}"
            )

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        return float(self.lr.max())

    @property
    def schedule_key(self) -> str:
        """The same for all curves of one schedule, whatever the peak learning rate."""
        return hashlib.sha256(np.round(self.lr / self.peak, 6).tobytes()).hexdigest()

    @property
    def tokens(self) -> Array | None:
        """The tokens (n,) seen at each logged step, None where not known."""
        if self.tokens_per_step is None:
            return None
        return self.step.astype(np.float64) * self.tokens_per_step


@dataclass
class Points:
    """Runs reduced to a size, a number of tokens and a final loss.

    parameters, tokens, loss: (n,); unique_tokens: (n,) tokens of the data before they repeat, or
    None; flops: (n,) training FLOPs, 6 N D where not given; names: (n,); total_parameters: (n,)
    with all experts, where ``parameters`` are those that a token uses, or None. Raises UserError
    for numbers that are not positive.
    """

    parameters: Array
    tokens: Array
    loss: Array
    unique_tokens: Array | None = None
    flops: Array | None = None
    names: Sequence[str] = ()
    name: str = "runs"
    warnings: list[str] = field(default_factory=list)
    total_parameters: Array | None = None

    def __post_init__(self) -> None:
        self.parameters, self.tokens, self.loss = (
            np.asarray(x, dtype=float) for x in (self.parameters, self.tokens, self.loss)
        )
        if self.flops is None:
            self.flops = 6 * self.parameters * self.tokens
        for what in ("parameters", "tokens", "loss", "flops", "unique_tokens", "total_parameters"):
            values = getattr(self, what)
            if values is not None and not (np.isfinite(values) & (values > 0)).all():
                bad = values[~(np.isfinite(values) & (values > 0))][0]
                raise UserError(f"{self.name}: {what} holds {bad}, expected positive numbers")
        if not len(self.names):
            self.names = [f"run {i + 1}" for i in range(len(self.loss))]

    def only(self, keep: Any) -> Points:
        """Return the points at the indices ``keep``."""
        keep = np.asarray(keep, dtype=int)
        unique = None if self.unique_tokens is None else self.unique_tokens[keep]
        total = None if self.total_parameters is None else self.total_parameters[keep]
        assert self.flops is not None
        return Points(
            self.parameters[keep],
            self.tokens[keep],
            self.loss[keep],
            unique,
            self.flops[keep],
            [self.names[i] for i in keep],
            self.name,
            list(self.warnings),
            total,
        )


def end_of_warmup(lr: Array) -> int:
    """Return the first step, from 0, after which the learning rate does not rise."""
    falls = np.flatnonzero(np.diff(lr) <= 0)
    return int(falls[0]) if len(falls) else len(lr) - 1


def end_of_logged_warmup(lr: Array) -> int:
    """Return the same of rates that were logged, which rounding may hold for some steps.

    The warm-up has ended where no rate of the next hundredth of the steps is 0.1 % higher.
    """
    window = max(1, len(lr) // 100) + 1
    highest = maximum_filter1d(lr, window, mode="nearest", origin=-(window // 2))
    step = int(np.flatnonzero(highest <= lr * 1.001)[0])
    while step + 1 < len(lr) and lr[step + 1] > lr[step]:
        step += 1
    return step


def points_of(curves: Sequence[Curve], last: int = 5) -> Points:
    """Reduce each curve to a point, whose loss is the mean of its ``last`` logged losses.

    The last loss of a thinned curve is such a mean already.

    Raises UserError where a curve's size or tokens are not known.
    """
    for curve in curves:
        if curve.parameters is None or curve.tokens_per_step is None:
            what = "parameters" if curve.parameters is None else "tokens per step"
            option = f"--{what.replace(' ', '-')}"
            raise UserError(f"{curve.name}: the {what} are not known; give {option}")
    sizes = np.array([float(c.parameters or 0) for c in curves])
    tokens = np.array([float(c.step[-1]) * (c.tokens_per_step or 0) for c in curves])
    per_token = np.array([c.flops_per_token or 6 * (c.parameters or 0) for c in curves])
    return Points(
        sizes,
        tokens,
        np.array([c.loss[-(last if c.averaged < last else 1) :].mean() for c in curves]),
        flops=tokens * per_token,
        names=[c.name for c in curves],
    )
