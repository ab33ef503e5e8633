"""Callbacks: all that happens in a run beside its steps; users add their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.training.callbacks.base import Callback, Decision
from pretrain.training.callbacks.blocks import LogBlocks
from pretrain.training.callbacks.carry import CarryStates
from pretrain.training.callbacks.loading import as_callbacks, load_callback
from pretrain.training.callbacks.log import LogSteps
from pretrain.training.callbacks.non_finite import StopNonFinite
from pretrain.training.callbacks.origin import FindOrigin
from pretrain.training.callbacks.phases import MarkPhases
from pretrain.training.callbacks.profiler import Profiler
from pretrain.training.callbacks.rank_times import NameSlowestRank
from pretrain.training.callbacks.sample import Sample, Summary
from pretrain.training.callbacks.save import Save
from pretrain.training.callbacks.spikes import RollBackSpikes, SkipSpikes
from pretrain.training.callbacks.time_left import TellTimeLeft
from pretrain.training.callbacks.validate import Validate
from pretrain.training.callbacks.watchdog import WatchProcesses

if TYPE_CHECKING:
    from pretrain.config import RunConfig

__all__ = [
    "Callback",
    "CarryStates",
    "Decision",
    "FindOrigin",
    "LogBlocks",
    "LogSteps",
    "MarkPhases",
    "NameSlowestRank",
    "Profiler",
    "RollBackSpikes",
    "Sample",
    "Save",
    "SkipSpikes",
    "StopNonFinite",
    "Summary",
    "TellTimeLeft",
    "Validate",
    "WatchProcesses",
    "as_callbacks",
    "default_callbacks",
    "load_callback",
]

_IN_LOOP_EVALUATION = "evals.harness.in_loop.InLoopEvaluation"
_SPIKE_POLICIES: dict[str, type[Callback]] = {"skip": SkipSpikes, "rollback": RollBackSpikes}


def default_callbacks(config: RunConfig) -> list[Callback]:
    """Return the callbacks of a run of these settings, in the order that they are called in.

    Those of the user come after them.
    """
    # First, so that it watches what the others do, and sees an exception last: it may end the
    # process.
    callbacks: list[Callback] = [WatchProcesses()]
    # Spikes before what looks at the step's outcome: after a rollback there is none.
    policy = _SPIKE_POLICIES.get(config.train.spikes.policy)
    if policy is not None:
        callbacks.append(policy())
    # What made a step not finite is said before the run is given up for it.
    if config.train.find_origin:
        callbacks.append(FindOrigin())
    # Giving up a run comes before logging the step.
    callbacks += [StopNonFinite(), TellTimeLeft(), LogSteps(), NameSlowestRank()]
    if config.logging.blocks:
        callbacks.append(LogBlocks())
    if config.profile.steps:
        callbacks.append(Profiler(*config.profile.steps, memory=config.profile.memory))
    if config.phases:
        callbacks.append(MarkPhases())
        if config.train.carry_state:
            callbacks.append(CarryStates())
    # Validation before the save, so that a run killed after it does not validate again; evaluation
    # after it: one that fails, or is stopped, costs no training.
    callbacks += [Validate(), Save()]
    if config.eval.tasks:
        # Loaded by name: training does not depend on the evaluations.
        callbacks.append(load_callback(_IN_LOOP_EVALUATION, "eval.tasks"))
    # Shown at the end, when the last checkpoint is written.
    return [*callbacks, Sample(), Summary()]
