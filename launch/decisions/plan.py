"""The plan of a decision: its arms, sizes and members, checked before anything is run."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from evals.scaling.decide import LOSS, PRIORS, Campaign, Prior, Rule, Run, Target
from evals.scaling.decide.record import hash_of_plan, runs_left
from evals.scaling.decide.runs import Cell
from evals.scaling.decide.trunks import Trunks
from launch.decisions.branching import decays_of
from launch.decisions.history import learned
from launch.decisions.settings import DecideConfig
from launch.grid import Member
from launch.matching import counts_of, match_members
from launch.planning import plan as plan_hours
from pretrain.common.config_files import load_values, read_values
from pretrain.common.config_loader import ConfigError, build_config, load_config
from pretrain.common.errors import UserError
from pretrain.config import RunConfig, check_run_config
from pretrain.model.spec import check_model

_LIKE = 0.2  # share by which arms of one size may differ in parameters
_CORPUS = ("data.", "train.data")
_VALIDATED = ("validation.", "train.seq_len")  # validation is in windows of seq_len


def label_of(run: Run, *, several: bool) -> str:
    """Return the name of a run's folder; ``several``: whether sizes have several lengths."""
    length = f"-{run.tokens:.0f}-tokens" if several else ""
    return f"{run.arm}-{run.parameters / 1e6:.3g}M{length}-seed{run.seed}"


@dataclass
class Plan:
    """A decision that can be made: what could be run, and at what price.

    ``members`` are by arm, cell and seed; ``left_out`` says why an arm takes no part.
    """

    name: str
    path: Path
    directory: Path
    settings: DecideConfig
    targets: dict[str, Target]
    runs: list[Run]
    members: dict[tuple[str, Cell, int], Member]
    left_out: dict[str, str] = field(default_factory=dict)
    counted: dict[str, dict[str, float]] = field(default_factory=dict)  # of the target, by arm
    trunks: Trunks = field(default_factory=Trunks)
    prior: Prior = LOSS
    target_configs: dict[str, RunConfig] = field(default_factory=dict)  # of the first seed, by arm

    @property
    def rule(self) -> Rule:
        """Return the rule of the settings."""
        s = self.settings
        return Rule(s.confidence, s.margin, s.budget, span=s.span)

    def campaign(self) -> Campaign:
        """Return the decision, with nothing run."""
        nats = self.settings.prior == "loss"
        return Campaign(self.targets, self.prior, self.rule, nats=nats)

    def left(self, done: Sequence[Run]) -> list[Run]:
        """Return the runs that could be made next, at the price of what would be new in them."""
        return runs_left(self.runs, done, self.trunks)

    @property
    def by_data(self) -> bool:
        """Return whether the arms are corpora."""
        return any(key.startswith(_CORPUS) for arm in self.settings.arms.values() for key in arm)

    def target_config(self, arm: str, seed: int) -> RunConfig:
        """Return the settings of an arm's run at the target."""
        config = copy.deepcopy(self.target_configs[arm])
        config.seed = seed
        return config

    def content(self) -> dict[str, Any]:
        """Return what is written before the first run, and hashed.

        Settings that came later are left out where they say nothing, so that the plans of older
        decisions are still theirs.
        """
        settings = asdict(self.settings)
        for name, nothing in (("lengths", [1.0]), ("history", [])):
            if settings[name] == nothing:
                del settings[name]
        content = {
            "decide": settings,
            "rule": asdict(self.rule),
            "prior": asdict(self.prior),
            "targets": {arm: asdict(target) for arm, target in self.targets.items()},
            "runs": [
                [run.arm, run.parameters, run.tokens, run.seed, run.cost] for run in self.runs
            ],
            "left_out": self.left_out,
        }
        if self.trunks.decays:
            content["decays"] = [[a, *cell, at] for (a, cell), at in self.trunks.decays.items()]
        return content

    @property
    def digest(self) -> str:
        """Return the hash of the content."""
        return hash_of_plan(self.content())


def load_plan(path: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """Read and check a file with a section ``decide``; raises ConfigError for what cannot be."""
    written = read_values(path)
    values = load_values(path, overrides, written=written)
    if "decide" not in values:
        raise ConfigError(f"{path}: there is no section decide, expected one with arms and target")
    where = f"{path}: decide"
    settings = build_config(DecideConfig, values["decide"], where)
    _check(settings, where)
    name = str(values.get("name"))
    directory = Path(values.get("directory") or Path("runs") / name)
    plan = Plan(name, Path(path), directory, settings, {}, [], {})
    prior = PRIORS[settings.prior]
    plan.prior = learned(
        prior.for_data() if plan.by_data else prior, settings.history, directory, where
    )
    loader = _Loader(path, overrides, written, plan, where)
    loader.fill()
    check_affordable(plan, where)
    return plan


def _check(settings: DecideConfig, where: str) -> None:
    if len(settings.arms) < 2:
        raise ConfigError(f"{where}.arms has {len(settings.arms)}, expected two or more by name")
    for name, arm in settings.arms.items():
        if not isinstance(arm, Mapping) or not name:
            raise ConfigError(f"{where}.arms.{name} is {arm!r}, expected settings by dotted name")
    if len({json.dumps(arm, sort_keys=True) for arm in settings.arms.values()}) < len(
        settings.arms
    ):
        raise ConfigError(f"{where}.arms has two arms with the same settings, expected others")
    if len(settings.sizes) < 2:
        raise ConfigError(f"{where}.sizes has {len(settings.sizes)}, expected two or more sizes")
    sized = {key for size in [*settings.sizes, settings.target.settings] for key in size}
    for name, arm in settings.arms.items():
        both = sorted(sized & set(arm))
        if both:
            raise ConfigError(
                f"{where}.arms.{name} sets {both[0]}, which sizes set too; expected one of them"
            )
        corpus = sorted(key for key in arm if key.startswith(_CORPUS))
        if corpus and settings.prior == "loss":
            raise ConfigError(
                f"{where}.arms.{name} sets {corpus[0]} and the metric is a loss: each corpus, or "
                "tokenizer, is best at its own text; expected a task's metric, with prior: task"
            )
        validated = sorted(key for key in arm if key.startswith(_VALIDATED))
        if validated and settings.prior == "loss":
            raise ConfigError(
                f"{where}.arms.{name} sets {validated[0]} and the metric is a loss: losses on "
                "other windows of text are not compared; expected it for all arms, outside decide"
            )


class _Loader:
    """Makes the members of every arm, size and seed."""

    def __init__(
        self,
        path: str | Path,
        overrides: Sequence[str],
        written: Mapping[str, Any],
        plan: Plan,
        where: str,
    ) -> None:
        self.path, self.overrides, self.written = path, overrides, written
        self.plan, self.where, self.settings = plan, where, plan.settings

    def fill(self) -> None:
        """Fill the plan's targets, runs and members; leave out arms that cannot be planned."""
        plan, settings = self.plan, self.settings
        models: dict[str, list[RunConfig]] = {}
        sizes = [*settings.sizes, settings.target.settings]
        for arm in settings.arms:
            try:
                models[arm] = [self._config(arm, size, None, 0) for size in sizes]
            except UserError as error:
                plan.left_out[arm] = str(error)
        if len(models) < 2:
            raise ConfigError(
                f"{self.where}.arms: fewer than two can be planned: "
                + "; ".join(plan.left_out.values())
            )
        first = next(iter(models))
        nominal = [float(counts_of(config).parameters) for config in models[first]]
        target = (nominal[-1], float(settings.target.tokens))
        self._check_sizes(models, nominal)
        each = settings.tokens_per_parameter or target[1] / target[0]
        for arm in models:
            cost = self._cost(arm, sizes[-1], target[1], noted=True)
            plan.targets[arm] = Target(*target, cost)
            plan.target_configs[arm] = models[arm][-1]
            for size, parameters in zip(settings.sizes, nominal[:-1], strict=True):
                self._lengths(arm, size, parameters, each * parameters)
        _check_lengths(plan, self.where)

    def _lengths(self, arm: str, size: Mapping[str, Any], parameters: float, whole: float) -> None:
        """Add the runs of an arm and a size, of every length and seed."""
        plan, settings = self.plan, self.settings
        shares = sorted(settings.lengths)
        configs = [self._config(arm, size, share * whole, 0) for share in shares]
        several = len(configs) > 1
        decays = decays_of(configs) if several else []
        for i, first in enumerate(configs):
            tokens = float(first.plan.tokens)
            price = self._price(first, tokens)  # seeds cost the same
            for seed in range(settings.seeds):
                run = Run(arm, parameters, tokens, seed, cost=price)
                config = first if seed == 0 else self._config(arm, size, shares[i] * whole, seed)
                label = label_of(run, several=several)
                config.name = f"{plan.name}-{label}"
                config.directory = str(plan.directory / label)
                if decays:
                    plan.trunks.decays[arm, run.cell] = decays[i]
                    config.checkpoint.keep = sorted(
                        {*config.checkpoint.keep, *(int(at) for at in decays[: i + 1])}
                    )
                plan.runs.append(run)
                plan.members[arm, run.cell, seed] = Member(label, {}, config)

    def _check_sizes(self, models: dict[str, list[RunConfig]], nominal: list[float]) -> None:
        for arm, configs in models.items():
            for config, parameters in zip(configs, nominal, strict=True):
                own = counts_of(config).parameters
                if abs(own / parameters - 1) > _LIKE:
                    raise ConfigError(
                        f"{self.where}: arm {arm} has {own:,} parameters where the first arm has "
                        f"{parameters:,.0f}, more than {_LIKE:.0%} apart; expected arms of like "
                        "size, or match: parameters"
                    )
                transferred = config.model.mup_base_hidden_size is not None
                if not transferred and not self.settings.tuned:
                    raise ConfigError(
                        f"{self.where}: the learning rate of arm {arm} is neither tuned nor "
                        "transferred; expected model.mup_base_hidden_size, or tuned: true where it "
                        "was tuned for every arm and size"
                    )
        for smaller, larger in pairwise(nominal):
            if larger <= smaller:
                raise ConfigError(
                    f"{self.where}.sizes: a size of {larger:,.0f} parameters follows one of "
                    f"{smaller:,.0f}, expected the smallest first and all below the target's"
                )

    def _config(
        self, arm: str, size: Mapping[str, Any], tokens: float | None, seed: int
    ) -> RunConfig:
        changes = {**self.settings.arms[arm], **size, "seed": seed, "train.steps": None}
        changes["train.tokens"] = int(tokens or self.settings.target.tokens)
        found = self._load(changes, f"{self.path}, arm {arm}")
        first = next(iter(self.settings.arms))
        if self.settings.match is not None and arm != first:
            other = {**changes, **self.settings.arms[first]}
            for key in set(self.settings.arms[arm]) - set(self.settings.arms[first]):
                other.pop(key)
            pair = [
                Member(first, {}, self._load(other, f"{self.path}, arm {first}")),
                Member(arm, {}, found),
            ]
            match_members(pair, self.settings.match, str(self.path))
        check_run_config(found, f"{self.path}, arm {arm}")
        return found

    def _load(self, changes: Mapping[str, Any], where: str) -> RunConfig:
        found = load_config(
            RunConfig,
            self.path,
            self.overrides,
            changes=changes,
            written=self.written,
            ignore=("grid", "decide"),
            where=where,
        )
        check_model(found.model, where)
        return found

    def _cost(self, arm: str, size: Mapping[str, Any], tokens: float, *, noted: bool) -> float:
        config = self._config(arm, size, tokens, 0)
        if noted:
            counts = counts_of(config)
            self.plan.counted[arm] = {
                "flops": counts.training_flops() * tokens,
                "6nd": 6 * counts.parameters * tokens,
            }
        return self._price(config, tokens)

    def _price(self, config: RunConfig, tokens: float) -> float:
        counts = counts_of(config)
        if self.settings.cost == "flops":
            return counts.training_flops() * tokens
        if self.settings.cost == "6nd":
            return 6.0 * counts.parameters * tokens
        found = plan_hours(config, self.settings.hardware, 1)
        if isinstance(found, str):
            raise ConfigError(f"{self.where}.cost is hours, but {config.name} has no plan: {found}")
        return float(found["device_hours"])


def _check_lengths(plan: Plan, where: str) -> None:
    """Raise ConfigError for lengths that would not be used, or are the same after rounding."""
    for arm, target in plan.targets.items():
        own = [run for run in plan.runs if run.arm == arm and run.seed == 0]
        least = plan.rule.tokens_per_parameter * target.tokens / target.parameters
        for run in own:
            if run.tokens / run.parameters < least * (1 - 1e-9):
                raise ConfigError(
                    f"{where}: runs of {run.tokens:,.0f} tokens at {run.parameters:,.0f} "
                    f"parameters have {run.tokens / run.parameters:.3g} tokens per parameter, and "
                    f"those under half the target's, {least:.3g}, are not used; expected greater "
                    "lengths, or tokens_per_parameter"
                )
        if len({run.cell for run in own}) < len(own):
            raise ConfigError(
                f"{where}.lengths: two are the same number of whole steps, expected others"
            )


def check_affordable(plan: Plan, where: str) -> None:
    """Raise ConfigError where nothing could be decided, whatever the runs say."""
    total = sum(target.cost for target in plan.targets.values())
    rule, budget = plan.rule, plan.settings.budget * total
    by_cell: dict[Cell, float] = {}
    for run in plan.runs:
        if run.seed == 0:
            by_cell[run.cell] = by_cell.get(run.cell, 0.0) + run.cost
    sizes = sorted({size for size, _ in by_cell})
    start = [min(cell for cell in by_cell if cell[0] == size) for size in sizes[:2]]
    first = sum(by_cell[cell] for cell in start)
    if first > budget:
        raise ConfigError(
            f"{where}.budget is {plan.settings.budget:g} of the target runs, but the two smallest "
            f"sizes of all arms cost {first / total:.3g}; expected more, or smaller sizes"
        )
    affordable = [cell for cell, cost in by_cell.items() if cell in start or first + cost <= budget]
    target = next(iter(plan.targets.values()))
    largest = max(run.compute for run in plan.runs if run.cell in affordable)
    if largest < rule.reach * target.compute:
        raise ConfigError(
            f"{where}: the largest size within the budget has {largest / target.compute:.3g} of "
            f"the target's compute, and nothing is said below {rule.reach:.3g}; expected a larger "
            "size, a larger budget or a nearer target"
        )
    span = max(size for size, _ in affordable) / sizes[0]
    if span < rule.span:
        raise ConfigError(
            f"{where}.sizes: those within the budget span {span:.3g}, and "
            f"nothing is said below span, {rule.span:g}; expected smaller or larger sizes"
        )
    least = min(run.compute for run in plan.runs)
    if least * (1 + 1e-9) < rule.smallest * target.compute:
        raise ConfigError(
            f"{where}.sizes: the smallest has 1/{target.compute / least:,.0f} of the target's "
            f"compute, which says too little of it; expected at least 1/{1 / rule.smallest:,.0f}"
        )
