"""Fit scaling laws to loss curves and to tables of runs.

.. code-block:: python

    from evals.scaling import fit, plan, predict, read_curves

    curves, skipped = read_curves(["runs/a", "runs/b", "other.csv"])
    found = fit("intrinsic", curves)
    plan(found, steps=24000)
"""

from evals.scaling.annealing_laws import CURVE_LAWS, AnnealingLaw, IntrinsicTimeLaw, MultiPowerLaw
from evals.scaling.curves import Curve, Points, points_of
from evals.scaling.downstream import Downstream, fit_downstream
from evals.scaling.experts_law import ExpertsLaw
from evals.scaling.fitting import Fit, Options, load_fit
from evals.scaling.hyperparameters import Optima, PowerFit, fit_powers, optima_of
from evals.scaling.intervals import bootstrap, interval
from evals.scaling.laws import LAWS, curve_law
from evals.scaling.library import fit, plan, predict
from evals.scaling.loss_to_loss import LossToLossLaw, Pairs, loss_to_loss_law
from evals.scaling.outliers import Outlier, robust_fit
from evals.scaling.readers import Reading, read_curves, read_points
from evals.scaling.run_tables import RunTable
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
    "Downstream",
    "ExpertsLaw",
    "Fit",
    "IntrinsicTimeLaw",
    "KaplanLaw",
    "LossToLossLaw",
    "MultiPowerLaw",
    "Optima",
    "Options",
    "Outlier",
    "Pairs",
    "Points",
    "PowerFit",
    "Reading",
    "RunTable",
    "bootstrap",
    "curve_law",
    "fit",
    "fit_downstream",
    "fit_powers",
    "interval",
    "load_fit",
    "loss_to_loss_law",
    "optima_of",
    "plan",
    "points_of",
    "predict",
    "read_curves",
    "read_points",
    "robust_fit",
    "size_law",
]
