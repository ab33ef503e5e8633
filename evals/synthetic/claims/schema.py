"""Read a claim's file: source, cost, arms, and the criteria by which it holds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evals.synthetic.claims.checks import CHECKS
from evals.synthetic.settings import SyntheticConfig, check_config
from pretrain.common.config_loader import (
    Config,
    ConfigError,
    build_config,
    load_config,
    nearest,
    setting,
)
from pretrain.common.errors import UserError
from pretrain.common.merging import merged

FOLDER = Path(__file__).parent


@dataclass
class Criterion(Config):
    """One inequality that a claim rests on, for each seed."""

    arm: str
    """The arm that is judged."""
    measure: str
    """What is measured, such as ``last 4x`` or ``loss 1x, 8 passes``."""
    minus_arm: str | None = None
    """Judge the difference to the same seed of this arm; null: to the same arm, if any."""
    minus_measure: str | None = None
    """Judge the difference to this measure; null: to the same measure, if any."""
    at_least: float | None = None
    """Smallest value that holds."""
    at_most: float | None = None
    """Largest value that holds."""
    seeds: int | None = setting(None, minimum=1)
    """Seeds for which it must hold; null: all."""


@dataclass
class Reduced(Config):
    """A small form of a claim, which tests run: the same criteria for fewer and smaller runs."""

    minutes: float = setting(above=0)
    """CPU minutes of all of it on one core."""
    seeds: list[int] = setting()
    """Its seeds, some of the claim's."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What is set over the settings of every arm."""
    arms: list[str] = field(default_factory=list)
    """The arms that it has, with the criteria of no others; empty: all."""


@dataclass
class Claim(Config):
    """A claim of a paper, and the runs that decide whether it holds here."""

    claim: str
    """What is claimed, in a sentence."""
    source: str
    """The paper."""
    minutes: float = setting(above=0)
    """CPU minutes of all arms and seeds on one core."""
    holds: list[Criterion] = setting()
    """What must hold, all of it."""
    arms: dict[str, dict[str, Any]] = setting()
    """Settings of each arm: those of ``python -m evals.synthetic``, or of ``check``."""
    measured: bool = False
    """Whether ``minutes`` were measured; otherwise they are an estimate."""
    note: str = ""
    """How the settings were found, and how they differ from the paper's."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What all arms share."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Seeds of every arm; those that settings were chosen on are not among them."""
    reduced: Reduced | None = None
    """What ``--reduced`` runs; null: there is no such form."""
    check: str | None = None
    """A function of :mod:`.checks` that measures the arms instead of training them."""

    def config(self, arm: str, seed: int, where: str) -> SyntheticConfig:
        """Return the settings of one run."""
        values = {**self.settings, **self.arms[arm], "seed": seed}
        config = build_config(SyntheticConfig, values, f"{where}: arms.{arm}")
        check_config(config, f"{where}: arms.{arm}")
        return config

    def measures(self) -> list[str]:
        """Return what the criteria name, each once, in order."""
        named = [
            name for c in self.holds for name in (c.measure, c.minus_measure) if name is not None
        ]
        return list(dict.fromkeys(named))


def claim_names() -> list[str]:
    """Return the names of all claims, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_claim(name: str, folder: Path = FOLDER) -> Claim:
    """Read a claim by its name; raises UserError where there is none or its file is wrong."""
    path = folder / f"{name}.yaml"
    if name not in [p.stem for p in folder.glob("*.yaml")]:
        names = sorted(p.stem for p in folder.glob("*.yaml"))
        raise UserError(
            f"there is no claim '{name}'{nearest(name, names)}, expected one of: {', '.join(names)}"
        )
    claim = load_config(Claim, path)
    _check(claim, path.name)
    return claim


def reduced_claim(claim: Claim, name: str) -> Claim:
    """Return the small form of a claim as a claim; raises UserError where there is none."""
    reduced = claim.reduced
    if reduced is None:
        known = [other for other in claim_names() if load_claim(other).reduced is not None]
        raise UserError(
            f"claim '{name}' has no reduced form, expected one of: {', '.join(known)}, or the "
            "command without --reduced"
        )
    arms = {arm: claim.arms[arm] for arm in reduced.arms or claim.arms}
    holds = [
        replace(criterion, seeds=criterion.seeds and min(criterion.seeds, len(reduced.seeds)))
        for criterion in claim.holds
        if {criterion.arm, criterion.minus_arm or criterion.arm} <= set(arms)
    ]
    return replace(
        claim,
        minutes=reduced.minutes,
        seeds=reduced.seeds,
        arms={arm: merged(values, reduced.settings) for arm, values in arms.items()},
        holds=holds,
        reduced=None,
    )


def _check_reduced(claim: Claim, reduced: Reduced, where: str) -> None:
    for arm in reduced.arms:
        if arm not in claim.arms:
            raise ConfigError(
                f"{where}: reduced.arms names '{arm}'{nearest(arm, list(claim.arms))}, expected "
                f"some of: {', '.join(claim.arms)}"
            )
    if not reduced.seeds or not set(reduced.seeds) <= set(claim.seeds):
        raise ConfigError(
            f"{where}: reduced.seeds is {reduced.seeds}, expected some of the claim's: "
            f"{', '.join(map(str, claim.seeds))}"
        )
    small = reduced_claim(claim, where)
    if not small.holds:
        raise ConfigError(
            f"{where}: reduced.arms is {reduced.arms}, of which no criterion is left, expected the "
            "arms of at least one"
        )
    for arm in small.arms:
        small.config(arm, small.seeds[0], f"{where}: reduced")


def _check(claim: Claim, where: str) -> None:
    if not (claim.arms and claim.holds and claim.seeds):
        raise ConfigError(f"{where}: expected at least one each of arms, holds and seeds")
    if claim.check is not None and claim.check not in CHECKS:
        raise ConfigError(
            f"{where}: check is '{claim.check}'{nearest(claim.check, list(CHECKS))}, expected one "
            f"of: {', '.join(CHECKS)}"
        )
    for index, criterion in enumerate(claim.holds):
        at = f"{where}: holds[{index}]"
        for name in (criterion.arm, criterion.minus_arm):
            if name is not None and name not in claim.arms:
                raise ConfigError(
                    f"{at}: there is no arm '{name}'{nearest(name, list(claim.arms))}, expected "
                    f"one of: {', '.join(claim.arms)}"
                )
        if (criterion.at_least is None) == (criterion.at_most is None):
            raise ConfigError(f"{at}: expected exactly one of at_least and at_most")
        if (criterion.seeds or 1) > len(claim.seeds):
            raise ConfigError(
                f"{at}: seeds is {criterion.seeds}, expected at most {len(claim.seeds)}, as many "
                "as the claim has"
            )
    if claim.check is None:
        for arm in claim.arms:
            claim.config(arm, claim.seeds[0], where)
    if claim.reduced is not None:
        _check_reduced(claim, claim.reduced, where)
