"""The learning rate over steps: its settings, its shapes, and the check that both fit a run.

A shape is a function here, marked by :func:`shape`; the choices of ``schedule.kind`` are the marked
ones. All of them are pure functions of the step, so that a run resumes at any.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, get_args

from pretrain.common.config_loader import Config, OneOf, setting

Decay = Literal["linear", "sqrt", "exponential"]
DECAYS: tuple[Decay, ...] = get_args(Decay)
_WHOLE = 1e-6  # steps by which a share of the steps may miss a whole number and be meant as it


class Progress(NamedTuple):
    """How far a run has come at a step after the warm-up."""

    step: int
    """Optimizer steps that were done."""
    num_steps: int
    """Those of the whole run."""
    after_warmup: float
    """The share, from 0 to 1, of the steps after the warm-up that were done."""
    of_decay: float
    """The share of the last ``decay_fraction`` of all steps that were done; 0 before them."""
    at_end: bool
    """Whether the step is one of the last ``decay_fraction``."""


@dataclass(frozen=True)
class Shape:
    """Hold a shape's function, which returns the learning rate as a share of its peak."""

    share: Callable[[ScheduleConfig, Progress], float]
    decays_at_end: bool
    """Whether it is flat until the last ``decay_fraction`` of the steps."""


SCHEDULES: dict[str, Shape] = {}
ScheduleKind = Annotated[str, OneOf(lambda: SCHEDULES)]


@dataclass
class ScheduleConfig(Config):
    """The learning rate over steps, as a share of its peak ``optimizer.lr``."""

    kind: ScheduleKind = setting("cosine")
    """``constant``; ``linear`` or ``cosine`` decay over the whole run; ``wsd``, constant and then a
    decay (arXiv 2404.06395); ``two_stage``, constant with an abrupt drop (arXiv 2408.11029)."""
    warmup_steps: int = setting(100, minimum=0)
    """Steps in which the learning rate grows linearly from 0."""
    decay: Decay = setting("linear")
    """Shape of the decay of ``wsd``."""
    decay_fraction: float = setting(0.2, above=0, maximum=1)
    """Share of all steps in which ``wsd`` decays, or at the end of the run which ``two_stage``
    spends after its drop; the decay may begin between two steps."""
    final_ratio: float = setting(0.1, minimum=0, maximum=1)
    """Learning rate where the decay ends, one step after the last, as a share of the peak."""


def learning_rate(config: ScheduleConfig, peak: float, step: int, num_steps: int) -> float:
    """Return the learning rate of optimizer step ``step``, counted from 0, of ``num_steps``.

    Warm-up is linear and reaches the peak with its last step; then the shape begins.
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    after_warmup = (step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1)
    decay_steps = fraction_of_steps(config.decay_fraction, num_steps)
    of_decay = min(max((step - (num_steps - decay_steps)) / decay_steps, 0.0), 1.0)
    progress = Progress(
        step, num_steps, min(after_warmup, 1.0), of_decay, step >= num_steps - decay_steps
    )
    return peak * SCHEDULES[config.kind].share(config, progress)


def fraction_of_steps(fraction: float, num_steps: int) -> float:
    """Return ``fraction`` of ``num_steps`` steps, exactly a whole number where it is meant as one.

    0.57 of 100 steps are 57, though their product in binary is 56.99999999999999. A product within
    a millionth of a step of a whole number (other than 0) is that number; others are not rounded,
    as 2.5 steps of 10. Whatever compares a share of the steps with steps takes it from here.
    """
    product = fraction * num_steps
    whole = round(product)
    return float(whole) if whole and abs(product - whole) < _WHOLE else product


_Share = Callable[[ScheduleConfig, Progress], float]


def shape(name: str, *, decays_at_end: bool = False) -> Callable[[_Share], _Share]:
    """Return a decorator that makes a function a choice of ``schedule.kind``.

    ``decays_at_end``: the shape is flat until the last ``decay_fraction`` of the steps, before
    which the warm-up must end.
    """

    def register(function: _Share) -> _Share:
        SCHEDULES[name] = Shape(function, decays_at_end)
        return function

    return register


@shape("constant")
def _constant(config: ScheduleConfig, progress: Progress) -> float:
    """Stay at the peak."""
    return 1.0


@shape("linear")
def _linear(config: ScheduleConfig, progress: Progress) -> float:
    """Fall by 1 - (1 - f) p, with p the share of the run that is done and f = final_ratio."""
    return 1 - (1 - config.final_ratio) * progress.after_warmup


@shape("cosine")
def _cosine(config: ScheduleConfig, progress: Progress) -> float:
    """Fall by f + (1 - f) (1 + cos(pi p)) / 2 (arXiv 1608.03983)."""
    final = config.final_ratio
    return final + (1 - final) * (1 + math.cos(math.pi * progress.after_warmup)) / 2


@shape("wsd", decays_at_end=True)
def _wsd(config: ScheduleConfig, progress: Progress) -> float:
    """Stay at the peak, then decay (arXiv 2404.06395).

    With q the share of the decay that is done: ``linear`` 1 - (1 - f) q; ``sqrt``
    1 - (1 - f) sqrt(q); ``exponential`` f^q.
    """
    done, final = progress.of_decay, config.final_ratio
    if config.decay == "exponential":
        return final**done
    return 1 - (1 - final) * (math.sqrt(done) if config.decay == "sqrt" else done)


@shape("two_stage", decays_at_end=True)
def _two_stage(config: ScheduleConfig, progress: Progress) -> float:
    """Stay at the peak, then drop to f at once.

    The annealing law's memory shows in such a drop (arXiv 2408.11029).
    """
    return config.final_ratio if progress.at_end else 1.0
