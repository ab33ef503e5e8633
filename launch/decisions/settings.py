"""The section ``decide`` of a file: arms, target, sizes and rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pretrain.common.config_loader import Config, setting


@dataclass
class TargetConfig(Config):
    """Where the arms are compared."""

    tokens: float = setting(minimum=1)
    """Training tokens of the target."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the target's size, by dotted name, as those of ``sizes``."""


@dataclass
class DecideConfig(Config):
    """What is decided, and when something is said."""

    target: TargetConfig
    """The size and length for which the arms are compared."""
    arms: dict[str, Any] = field(default_factory=dict)
    """Two or more arms by name: the settings of each, by dotted name."""
    sizes: list[dict[str, Any]] = field(default_factory=list)
    """Settings of the sizes that may be run, smallest first; best four to six, each about 2.5 times
    the last, from a 2,500th of the target's compute to a third."""
    metric: str = "loss"
    """``loss`` (validation loss), or a name in the runs' metrics; lower is better."""
    prior: Literal["loss", "task"] = setting("loss")
    """The kind of the metric: losses have smaller differences and less noise than tasks."""
    confidence: float = setting(0.95, above=0.5, below=1.0)
    """The probability from which something is said."""
    margin: float = setting(0.05, above=0.0)
    """The share of compute below which a difference does not matter."""
    budget: float = setting(0.3, above=0.0)
    """What may be spent, as a share of the arms' target runs."""
    span: float = setting(8.0, minimum=1.0)
    """Between the smallest and the largest size of both arms before anything is said."""
    seeds: int = setting(3, minimum=1)
    """Seeds of each size that may be run."""
    tokens_per_parameter: float | None = setting(None, above=0.0)
    """Tokens of a run for each parameter; null: the target's."""
    lengths: list[float] = setting(factory=lambda: [1.0], above=0.0, maximum=1.0)
    """Lengths of each size that may be run, as shares of these tokens. With ``schedule.kind: wsd``
    they are branches: the second one goes on from where the first begins to decay, and costs what
    is new in it."""
    history: list[str] = setting(factory=list)
    """Folders of decisions that have ended, of the same kind of metric: how large differences,
    trends and noise were there is what is expected here."""
    tuned: bool = False
    """Whether each arm's learning rate was tuned at each size; else they are transferred, with
    ``model.mup_base_hidden_size``."""
    match: Literal["parameters"] | None = setting(None)
    """``parameters``: every arm's MLPs are resized to the parameters of the first arm."""
    cost: Literal["flops", "6nd", "hours"] = setting("flops")
    """What the budget counts: FLOPs with attention, 6 x parameters x tokens, or planned
    device-hours."""
    hardware: str = "cpu"
    """The machine of ``configs/hardware`` that hours are planned for."""
