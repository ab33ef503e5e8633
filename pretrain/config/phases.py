"""The phases of a run: what each changes of the run's settings, and until when it lasts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pretrain.common.config_loader import Config, ConfigError, check_of, setting
from pretrain.config.data import DataConfig, DataSource
from pretrain.config.distill import PhaseDistill
from pretrain.config.schedule import ScheduleConfig, ScheduleKind


@dataclass
class PhaseSchedule(ScheduleConfig):
    """The learning rate from a phase on, as a share of its peak, see ``lr``.

    It is planned for the steps of this phase and of those after it that set none.
    """

    kind: ScheduleKind = setting("linear")
    """As ``schedule.kind``."""
    warmup_steps: int = setting(0, minimum=0)
    """Steps in which the learning rate goes linearly from where the phase begins to its peak."""
    decay_fraction: float = setting(0.2, above=0, maximum=1)
    """As ``schedule.decay_fraction``, of the steps that it is planned for."""


@dataclass
class PhaseData(Config):
    """The data of a phase, which must have been tokenized as the run's."""

    path: str | None = None
    """As ``data.path``; null, with no ``blend``: that of the run."""
    weights: dict[str, float] = setting(factory=dict, minimum=0)
    """As ``data.weights``."""
    blend: list[DataSource] = field(default_factory=list)
    """As ``data.blend``."""

    def over(self, data: DataConfig) -> DataConfig:
        """Return the settings of the phase's data, of which ``data`` are the run's."""
        path = data.path if self.path is None and not self.blend else self.path
        return replace(data, path=path, weights=self.weights, blend=self.blend)


@dataclass
class PhaseConfig(Config):
    """A part of a run with settings of its own; what it does not name is as the run has it."""

    name: str | None = None
    """Its name in the log, the metrics and the report; null: ``phase`` and its number."""
    until: float | None = setting(None, above=0, maximum=1)
    """Where it ends, as a share of all tokens, rounded up to a whole step. The last one ends with
    the run."""
    until_tokens: int | None = setting(None, minimum=1)
    """Where it ends, in tokens since the run began, in place of ``until``."""
    data: PhaseData | None = None
    """Its data; null: the run's."""
    seq_len: int | None = setting(None, minimum=2)
    """Tokens of a sequence; null: ``train.seq_len``."""
    global_batch_tokens: int | None = setting(None, minimum=1)
    """Tokens of an optimizer step; null: ``train.global_batch_tokens``."""
    micro_batch_size: int | None = setting(None, minimum=1)
    """Sequences per forward pass of one process; null: ``parallel.micro_batch_size``."""
    lr: float | None = setting(None, above=0)
    """Peak of its ``schedule``; null: the learning rate where it begins."""
    schedule: PhaseSchedule | None = None
    """The learning rate from here on; null: as planned before."""
    distill: PhaseDistill | None = None
    """How it learns from the teacher; null: as ``distill`` has it."""


@check_of(PhaseConfig)
def _check_phase(phase: PhaseConfig, where: str, section: str) -> None:
    if phase.until is not None and phase.until_tokens is not None:
        raise ConfigError(
            f"{where}: {section}until is {phase.until} and {section}until_tokens "
            f"{phase.until_tokens}, expected at most one of them to be set"
        )
    if phase.lr is not None and phase.schedule is None:
        raise ConfigError(
            f"{where}: {section}lr is {phase.lr}, the peak of a schedule that begins with the "
            f"phase, but {section}schedule is null; expected a schedule, such as {{kind: constant}}"
        )
    data = phase.data
    if data is not None and data.blend and (data.path is not None or data.weights):
        raise ConfigError(
            f"{where}: {section}data sets blend, and path or weights beside it; expected either"
        )
