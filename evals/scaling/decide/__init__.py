"""Decide which of several arms is better at a target from small runs, for how sure, at what price.

.. code-block:: python

    from evals.scaling.decide import TASK, Campaign, Rule, Run, Target

    runs = [Run("a", 20e6, 2e9, 0, 1.24), Run("b", 20e6, 2e9, 0, 1.21), ...]
    campaign = Campaign({"a": Target(1e9, 100e9), "b": Target(1e9, 100e9)}, TASK, Rule())
    step = campaign.step(runs, candidates)

The arms' differences are measured in compute: u of an arm says that it is worth exp(u) times the
compute. ``docs/decide.md`` describes the model and what can be said with it.
"""

from evals.scaling.decide.acquisition import Candidate, Scored
from evals.scaling.decide.curve import CommonCurve, fit_common_curve
from evals.scaling.decide.inference import Posterior, infer
from evals.scaling.decide.observations import Observations, observe
from evals.scaling.decide.prior import LOSS, PRIORS, TASK, Prior
from evals.scaling.decide.replay import Outcome, play
from evals.scaling.decide.rule import Campaign, Rule, Step, Verdict
from evals.scaling.decide.runs import Run, Target

__all__ = [
    "LOSS",
    "PRIORS",
    "TASK",
    "Campaign",
    "Candidate",
    "CommonCurve",
    "Observations",
    "Outcome",
    "Posterior",
    "Prior",
    "Rule",
    "Run",
    "Scored",
    "Step",
    "Target",
    "Verdict",
    "fit_common_curve",
    "infer",
    "observe",
    "play",
]
