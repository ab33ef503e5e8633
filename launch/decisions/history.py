"""Learn from decisions that have ended what differences, trends and noise to expect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from evals.scaling.decide import Prior
from evals.scaling.decide.curve import Array
from evals.scaling.decide.record import (
    campaign_of,
    is_decision,
    planned_runs,
    read_log,
    read_plan,
    runs_of_row,
    trunks_of,
)
from pretrain.common.config_loader import ConfigError

_LEAST_SPREAD = 0.35  # of the logarithms: other arms differ from these


def learned(prior: Prior, folders: Sequence[str], own: Path, where: str) -> Prior:
    """Return the prior after the decisions of ``folders``, one after another.

    Raises ConfigError for one that has not ended, has another kind of metric or is ``own``.
    """
    known: set[Path] = set()
    for folder in map(Path, folders):
        if folder.resolve() in known:
            raise ConfigError(f"{where}.history names {folder} twice, expected it once")
        known.add(folder.resolve())
        if not is_decision(folder):
            raise ConfigError(f"{where}.history: {folder} is no folder of a decision, expected one")
        if folder.resolve() == own.resolve():
            raise ConfigError(
                f"{where}.history: {folder} is this decision's own folder, expected others: its "
                "runs would count twice"
            )
        content, digest = read_plan(folder)
        rows = read_log(folder, digest)
        if not rows or rows[-1]["taken"] is not None:
            raise ConfigError(
                f"{where}.history: the decision in {folder} has not ended, expected one that has"
            )
        if content["prior"]["name"] != prior.name:
            raise ConfigError(
                f"{where}.history: {folder} decided by a {content['prior']['name']}, expected a "
                f"{prior.name}, as here"
            )
        campaign = campaign_of(content)
        campaign.prior = prior
        done = runs_of_row(rows[-1], planned_runs(content), trunks_of(content))
        posterior = campaign.step(done, []).posterior
        if posterior is None:
            continue  # fewer than two arms or sizes came to an end: it says nothing
        logs = np.log(posterior.draws.sizes)
        mean = posterior.weights @ logs
        spread = np.sqrt(posterior.weights @ (logs - mean) ** 2)
        prior = replace(
            prior,
            medians=_four(np.exp(mean)),
            spreads=_four(np.maximum(spread, _LEAST_SPREAD)),
        )
    return prior


def _four(values: Array) -> tuple[float, float, float, float]:
    """Return four values as the plan has them."""
    level, slope, wander, noise = (float(f"{value:.6g}") for value in values)
    return level, slope, wander, noise
