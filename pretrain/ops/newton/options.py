"""Options of Newton's method, and its report."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NewtonOptions:
    """Settings of the solver.

    Attributes:
        iterations: the most Newton steps.
        tolerance: the residual at which a sequence has converged; None: 1e-5, in float64 1e-11.
        fallback: whether sequences that have not converged are computed step by step.
        report: what counts them.
    """

    iterations: int = 10
    tolerance: float | None = None
    fallback: bool = True
    report: NewtonReport | None = None

    def check(self, op: str) -> None:
        """Raise ValueError, naming ``op``, for less than one Newton step."""
        if self.iterations < 1:
            raise ValueError(f"{op}: iterations is {self.iterations}, expected at least 1")

    def tolerance_in(self, dtype: torch.dtype) -> float:
        """Return the tolerance of residuals of states in ``dtype``."""
        if self.tolerance is not None:
            return self.tolerance
        return 1e-11 if dtype == torch.float64 else 1e-5


class NewtonReport:
    """A record of what the solver did since it was made.

    On a GPU the numbers stay there until one is read, so that nothing waits for them.

    Attributes:
        residual: largest |f(h_{l-1}, x_l) - h_l| (of bounded states; else divided by
            1 + |h_l|) after the last Newton step, before any fallback. Of ParaGRU and ParaLSTM,
            which step through segments: the most by which a segment's start would still move.
        fallbacks: sequences that had not converged and were computed step by step.
        sequences: all sequences that were solved.
        iterations: the most Newton steps that any time chunk took.
    """

    def __init__(self) -> None:
        self.sequences = 0
        self._worst: Tensor | None = None  # [2]: residual, iterations
        self._fallbacks: Tensor | int = 0

    def add(
        self,
        residual: float | Tensor,
        fallbacks: int | Tensor,
        sequences: int,
        iterations: int | Tensor,
    ) -> None:
        """Add one solve: its largest residual, fallbacks of so many sequences, and its steps."""
        device = residual.device if isinstance(residual, Tensor) else None
        pair = [torch.as_tensor(x, device=device).double() for x in (residual, iterations)]
        new = torch.stack(pair)
        # A residual that is not a number is the largest of all, and stays it.
        self._worst = new if self._worst is None else torch.maximum(self._worst, new)
        self._fallbacks = self._fallbacks + fallbacks
        self.sequences += sequences

    def __repr__(self) -> str:
        return (
            f"NewtonReport(residual={self.residual:.3g}, fallbacks={self.fallbacks}, "
            f"sequences={self.sequences}, iterations={self.iterations})"
        )

    @property
    def residual(self) -> float:
        """Return the largest residual, 0 before any solve."""
        return 0.0 if self._worst is None else float(self._worst[0])

    @property
    def iterations(self) -> int:
        """Return the most Newton steps, 0 before any solve."""
        return 0 if self._worst is None else int(self._worst[1])

    @property
    def fallbacks(self) -> int:
        """Return how many sequences were computed step by step."""
        return int(self._fallbacks)
