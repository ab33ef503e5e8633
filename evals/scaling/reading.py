"""Hold what logs do not say, for all of them or for each by name."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pretrain.common.errors import UserError

Unit = Literal["nats", "bits"]
# By field: the option that gives it.
_BY_NAME = {
    "schedule": "--schedule",
    "warmup_steps": "--warmup-steps",
    "parameters": "--parameters",
    "tokens_per_step": "--tokens-per-step",
    "unit": "--unit",
    "branch_of": "--branch-of",
}


@dataclass
class Reading:
    """Options for what a file does not say.

    columns: names of step, lr, loss, tokens; schedule: as :func:`parse_schedule` takes it;
    warmup_steps; parameters; tokens_per_step; from_step: earlier losses are skipped (None: those
    of the warm-up); smooth: factor of an exponential mean, 0 = off; embeddings: whether N counts
    them; unit: of the losses, per token; branch_of: the name of the curve whose learning rates a
    curve has before its first step; points: means of neighboring losses to which longer curves are
    reduced, from twice as many on (0: none); axis_unit: tokens that count as a step on axes of
    tokens, where ``tokens_per_step`` is not known either (None: a round number). What
    only one curve has is a mapping of its name, or of a pattern such as ``*100M*``.
    """

    columns: dict[str, str] | None = None
    schedule: str | Mapping[str, str] | None = None
    warmup_steps: int | Mapping[str, int] | None = None
    parameters: float | Mapping[str, float] | None = None
    tokens_per_step: float | Mapping[str, float] | None = None
    from_step: int | None = None
    smooth: float = 0.0
    embeddings: bool = True
    keep_diverged: bool = False
    unit: Unit | Mapping[str, Unit] = "nats"
    branch_of: str | Mapping[str, str] | None = None
    points: int = 300
    axis_unit: float | None = None
    used: set[tuple[str, str]] = field(default_factory=set, repr=False, compare=False)
    seen: set[str] = field(default_factory=set, repr=False, compare=False)

    def of(self, name: str) -> OneReading:
        """Return the options of the curve ``name``."""
        self.seen.add(name)
        found = {what: self._pick(what, name) for what in _BY_NAME}
        found["unit"] = found["unit"] or "nats"
        return OneReading(
            **found,
            **{
                what: getattr(self, what)
                for what in ("from_step", "smooth", "embeddings", "points")
            },
        )

    def _pick(self, what: str, name: str) -> Any:
        given = getattr(self, what)
        if not isinstance(given, Mapping):
            return given
        matching = [key for key in given if key == name or fnmatch.fnmatchcase(name, key)]
        self.used.update((what, key) for key in matching)
        exact = [key for key in matching if key == name] or matching
        return given[exact[0]] if exact else None

    def check_names(self) -> None:
        """Raise UserError where an option names a curve that none of those read is called."""
        for what, option in _BY_NAME.items():
            given = getattr(self, what)
            # A file of schedules may serve several fits.
            if not isinstance(given, Mapping) or what == "schedule":
                continue
            for key in given:
                if (what, key) not in self.used:
                    raise UserError(
                        f"{option} names '{key}', which no curve is called, expected one of "
                        f"{_listed(sorted(self.seen))}"
                    )

    def with_changes(self, changes: Mapping[str, Any]) -> Reading:
        """Return these options with those that are not None in ``changes``."""
        given = {what: value for what, value in changes.items() if value is not None}
        found = dataclasses.replace(self, **given)
        found.used, found.seen = self.used, self.seen
        return found


@dataclass
class OneReading:
    """The options of one curve, see :class:`Reading`."""

    schedule: str | None = None
    warmup_steps: int | None = None
    parameters: float | None = None
    tokens_per_step: float | None = None
    from_step: int | None = None
    smooth: float = 0.0
    embeddings: bool = True
    unit: Unit = "nats"
    branch_of: str | None = None
    points: int = 300


def _listed(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - most} others" if len(names) > most else ""
    return ", ".join(names[:most]) + more
