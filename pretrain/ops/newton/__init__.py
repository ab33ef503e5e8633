"""Elementwise non-linear recurrences, parallel over time by Newton's method."""

from pretrain.ops.newton.dispatch import newton_recurrence
from pretrain.ops.newton.options import NewtonOptions, NewtonReport

__all__ = ["NewtonOptions", "NewtonReport", "newton_recurrence"]
