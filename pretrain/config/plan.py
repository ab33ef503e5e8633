"""The plan of a run: which step belongs to which phase, its batch, and its learning rate.

A run without phases is a plan of one. Everything that asks how many steps or tokens a run has, or
what a step is, asks here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from pretrain.common.errors import ConfigError
from pretrain.config.schedule import ScheduleConfig, learning_rate

if TYPE_CHECKING:
    from pretrain.config.run import RunConfig

_WHOLE = Fraction(1, 10**6)  # steps by which a share may miss a whole number and be meant as it


@dataclass(frozen=True)
class Phase:
    """One phase of a run.

    Attributes:
        number: From 1.
        first: Its first step, counted from 0.
        last: The step after its last one.
        tokens: Tokens of its steps.
        config: The run's settings during it, without phases. Its budget and schedule are the
            run's.
    """

    number: int
    name: str
    first: int
    last: int
    tokens: int
    config: RunConfig

    @property
    def steps(self) -> int:
        """Return the number of its steps."""
        return self.last - self.first


@dataclass(frozen=True)
class _Rates:
    """A schedule from step ``first`` to ``last``, that grows from ``start`` to its ``peak``."""

    first: int
    last: int
    schedule: ScheduleConfig
    start: float
    peak: float

    def at(self, step: int) -> float:
        """Return the rate of a step of the run."""
        done, warmup = step - self.first, self.schedule.warmup_steps
        if self.start and done < warmup:
            return self.start + (self.peak - self.start) * (done + 1) / warmup
        return learning_rate(self.schedule, self.peak, done, self.last - self.first)


class RunPlan:
    """The steps of a run's phases.

    Raises ConfigError, which begins with ``where`` or the run's name, where phases do not follow
    each other.
    """

    phases: list[Phase]

    def __init__(self, config: RunConfig, where: str | None = None):
        self._where = where or f"run '{config.name}'"
        self._train = config.train
        self._align_share = 0.0 if config.distill is None else config.distill.align_steps
        self._aligned_by_phases = any(p.distill and p.distill.align for p in config.phases)
        # Batches of one size or of a warm-up are the run's own to count.
        self._batches = (
            [p.global_batch_tokens or config.train.global_batch_tokens for p in config.phases]
            if any(p.global_batch_tokens is not None for p in config.phases)
            else None
        )
        ends = self._ends(config)
        firsts = [0, *ends[:-1]]
        counts = [0]  # tokens before each phase
        for number, (first, last) in enumerate(zip(firsts, ends, strict=True)):
            if self._batches is None:
                counts.append(config.train.tokens_before(last))
            else:
                counts.append(counts[-1] + (last - first) * self._batches[number])
        self.phases = []
        for number, (first, last) in enumerate(zip(firsts, ends, strict=True)):
            name = config.phases[number].name if config.phases else None
            tokens = counts[number + 1] - counts[number]
            settings = phase_settings(config, number)
            self.phases.append(
                Phase(number + 1, name or f"phase {number + 1}", first, last, tokens, settings)
            )
        self._rates = self._schedules(config)

    @property
    def num_steps(self) -> int:
        """Return the number of optimizer steps of the whole run."""
        return self.phases[-1].last

    @property
    def tokens(self) -> int:
        """Return the number of tokens of the whole run."""
        return self.tokens_before(self.num_steps)

    def phase_at(self, step: int) -> Phase:
        """Return the phase of a step, counted from 0; the last one for steps after it."""
        return next((p for p in self.phases if step < p.last), self.phases[-1])

    def batch_tokens(self, step: int) -> int:
        """Return the number of tokens of optimizer step ``step``, counted from 0."""
        if self._batches is None:
            return self._train.batch_tokens(step)
        return self._batches[self.phase_at(step).number - 1]

    def tokens_before(self, step: int) -> int:
        """Return the number of tokens of all steps before ``step``."""
        if self._batches is None:
            return self._train.tokens_before(step)
        total = 0
        for phase, batch in zip(self.phases, self._batches, strict=True):
            last = phase.last if phase is not self.phases[-1] else max(step, phase.last)
            total += max(min(step, last) - phase.first, 0) * batch
        return total

    def step_at(self, tokens: int) -> int:
        """Return the first step before which there are so many tokens."""
        return _first_step(self.tokens_before, Fraction(tokens))

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of optimizer step ``step``, counted from 0."""
        rates = next((r for r in self._rates if step < r.last), self._rates[-1])
        return rates.at(step)

    @property
    def aligned_steps(self) -> int:
        """Return the number of steps, at the beginning, that align new mixers with a teacher."""
        leading = 0
        for phase in self.phases:
            distill = phase.config.distill
            if not self._aligned_by_phases or distill is None or distill.align_steps == 0:
                break
            leading = phase.last
        share = 0.0 if self._aligned_by_phases else self._align_share
        return leading or math.ceil(Fraction(str(share)) * self.num_steps)

    def schedules(self) -> list[tuple[str, ScheduleConfig, int]]:
        """Return each schedule with the setting that it is, and the steps it is planned for."""
        names = ["schedule"] + [
            f"phases[{p.number - 1}].schedule" for p in self.phases if p.first in self._begun
        ]
        names = names[-len(self._rates) :]
        return [
            (name, r.schedule, r.last - r.first) for name, r in zip(names, self._rates, strict=True)
        ]

    # How it is made

    def _ends(self, config: RunConfig) -> list[int]:
        """Return the step after the last one of every phase."""
        train, phases = config.train, config.phases
        if not phases:
            return [train.num_steps]
        shares = self._shares(config)
        if self._batches is None:
            total = train.tokens_before(train.num_steps) if train.steps else train.tokens or 0
            ends = [_first_step(train.tokens_before, share * total) for share in shares[:-1]]
            ends.append(train.num_steps)
        else:
            ends = self._ends_of_batches(shares, self._batches)
        for number, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
            if last <= first:
                raise ConfigError(
                    f"{self._where}: phases[{number}] has no step: it begins and ends after step "
                    f"{first} of the run; expected a later end, or a longer run"
                )
        return ends

    def _ends_of_batches(self, shares: list[Fraction], batches: list[int]) -> list[int]:
        """Return the ends of phases with batches of their own."""
        train = self._train
        parts = [b - a for a, b in zip([Fraction(0), *shares], shares, strict=False)]
        if train.steps is not None:  # as many tokens as make so many steps
            total = train.steps / sum(p / b for p, b in zip(parts, batches, strict=True))
        else:
            total = Fraction(train.tokens or 0)
        ends, step, tokens = [], 0, 0
        for share, batch in zip(shares, batches, strict=True):
            wanted = share * total - tokens
            steps = math.ceil(wanted / batch - _WHOLE)
            step, tokens = step + max(steps, 0), tokens + max(steps, 0) * batch
            ends.append(step)
        if train.steps is not None:
            ends[-1] = train.steps
        return ends

    def _shares(self, config: RunConfig) -> list[Fraction]:
        """Return the share of all tokens at which each phase ends."""
        where, train, shares = self._where, config.train, list[Fraction]()
        for number, phase in enumerate(config.phases):
            at, last = f"phases[{number}]", number == len(config.phases) - 1
            if phase.until is None and phase.until_tokens is None:
                if not last:
                    raise ConfigError(
                        f"{where}: {at} has no until and is not the last; expected until or "
                        "until_tokens, where it ends"
                    )
                share = Fraction(1)
            elif phase.until_tokens is not None:
                if train.tokens is None:
                    raise ConfigError(
                        f"{where}: {at}.until_tokens is {phase.until_tokens} in a run whose budget "
                        "is train.steps; expected until, or train.tokens"
                    )
                share = Fraction(phase.until_tokens, train.tokens)
            else:
                share = Fraction(str(phase.until))
            if share <= (shares[-1] if shares else 0) or share > 1:
                ends = f"until_tokens is {phase.until_tokens}"
                ends = f"until is {phase.until}" if phase.until_tokens is None else ends
                raise ConfigError(
                    f"{where}: {at}.{ends}, expected an end after that of the phase before, within "
                    "the run"
                )
            if last and share != 1:
                raise ConfigError(
                    f"{where}: {at}, the last one, ends at a share of {float(share):.6g} of the "
                    "tokens; expected 1, or no until"
                )
            shares.append(share)
        return shares

    def _schedules(self, config: RunConfig) -> list[_Rates]:
        """Return the schedules in their order, each up to the phase with the next one."""
        begun = [p.first for p in self.phases if config.phases and self._own(config, p) is not None]
        self._begun = begun
        ends = [*begun[1:], self.num_steps] if begun else []
        found = []
        if not begun or begun[0] > 0:
            last = begun[0] if begun else self.num_steps
            found.append(_Rates(0, last, config.schedule, 0.0, config.optimizer.lr))
        for first, last in zip(begun, ends, strict=True):
            phase = self.phase_at(first)
            own = config.phases[phase.number - 1]
            assert own.schedule is not None
            start = found[-1].at(first) if found else 0.0
            peak = own.lr or (start if found else config.optimizer.lr)
            if not peak:
                raise ConfigError(
                    f"{self._where}: phases[{phase.number - 1}].schedule begins where the learning "
                    f"rate is 0; expected phases[{phase.number - 1}].lr, or an earlier schedule "
                    "with a final_ratio above 0"
                )
            found.append(_Rates(first, last, own.schedule, start, peak))
        return found

    def _own(self, config: RunConfig, phase: Phase) -> ScheduleConfig | None:
        return config.phases[phase.number - 1].schedule


def phase_settings(config: RunConfig, number: int) -> RunConfig:
    """Return the settings of a run during its phase ``number``, from 0; itself without phases."""
    if not config.phases:
        return config
    phase = config.phases[number]
    train = replace(
        config.train,
        seq_len=phase.seq_len or config.train.seq_len,
        global_batch_tokens=phase.global_batch_tokens or config.train.global_batch_tokens,
    )
    rows = phase.micro_batch_size or config.parallel.micro_batch_size
    distill, own = config.distill, phase.distill
    if distill is not None and own is not None:
        given = {n: getattr(own, n) for n in ("weight", "temperature", "reverse")}
        changes = {name: value for name, value in given.items() if value is not None}
        distill = replace(distill, **changes)
    if distill is not None and any(p.distill and p.distill.align for p in config.phases):
        distill = replace(distill, align_steps=float(own is not None and own.align))
    return replace(
        config,
        data=config.data if phase.data is None else phase.data.over(config.data),
        train=train,
        parallel=replace(config.parallel, micro_batch_size=rows),
        distill=distill,
        phases=[],
    )


def _first_step(tokens_before: Callable[[int], int], tokens: Fraction) -> int:
    """Return the first step before which there are ``tokens`` tokens, or hardly fewer."""
    low, high = 0, 1
    while tokens_before(high) < tokens:
        high *= 2
    while low < high:
        middle = (low + high) // 2
        batch = tokens_before(middle + 1) - tokens_before(middle)
        if tokens_before(middle) >= tokens - _WHOLE * batch:
            high = middle
        else:
            low = middle + 1
    return low
