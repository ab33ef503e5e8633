"""Fit scaling laws to loss curves and to tables of runs.

.. code-block:: python

    from evals.scaling import IntrinsicTimeLaw, fit, read_curves

    curves, skipped = read_curves(["runs/a", "runs/b", "other.csv"])
    found = fit(IntrinsicTimeLaw(reference=max(c.peak for c in curves)), curves)
"""

from evals.scaling.annealing_laws import CURVE_LAWS, AnnealingLaw, IntrinsicTimeLaw, MultiPowerLaw
from evals.scaling.curves import Curve, Points, points_of
from evals.scaling.fitting import Fit, Options, fit, load_fit
from evals.scaling.intervals import bootstrap, interval
from evals.scaling.laws import LAWS, curve_law
from evals.scaling.readers import Reading, read_curves, read_points
from evals.scaling.size_laws import (
    SIZE_LAWS,
    ChinchillaLaw,
    ComputeLaw,
    DataConstrainedLaw,
    KaplanLaw,
    size_law,
)

__all__ = [
    "CURVE_LAWS",
    "LAWS",
    "SIZE_LAWS",
    "AnnealingLaw",
    "ChinchillaLaw",
    "ComputeLaw",
    "Curve",
    "DataConstrainedLaw",
    "Fit",
    "IntrinsicTimeLaw",
    "KaplanLaw",
    "MultiPowerLaw",
    "Options",
    "Points",
    "Reading",
    "bootstrap",
    "curve_law",
    "fit",
    "interval",
    "load_fit",
    "points_of",
    "read_curves",
    "read_points",
    "size_law",
]
