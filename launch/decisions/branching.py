"""Lengths of one run as branches: where they begin, and the configs that say so."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

from launch.grid import Member
from pretrain.config import RunConfig
from pretrain.config.branch import BranchConfig
from pretrain.config.schedule import fraction_of_steps


def decays_of(lengths: Sequence[RunConfig]) -> list[float]:
    """Return after how many tokens each length begins to decay; nothing where they share nothing.

    They share what comes before the decays of ``wsd``; with any other schedule, or phases, whose
    borders are shares of all tokens, each length is a run of its own.
    """
    found = []
    for config in lengths:
        steps = config.plan.num_steps
        stable = math.floor(steps - fraction_of_steps(config.schedule.decay_fraction, steps))
        if config.schedule.kind != "wsd" or config.phases or config.branch or stable < 1:
            return []
        found.append(float(config.plan.tokens_before(stable)))
    return found


def as_branch(member: Member, trunk: Member, tokens: float) -> Member:
    """Return a member that goes on from another one after so many tokens.

    Its decay stays where it was planned, so that it ends as the whole run would.
    """
    config = copy.deepcopy(member.config)
    config.branch = BranchConfig(
        run=str(trunk.config.run_directory), tokens=int(tokens), decay="planned"
    )
    return Member(member.name, member.changes, config, member.labels)
