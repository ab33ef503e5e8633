"""The settings of a training run; see :func:`load_run_config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from pretrain.common.config_loader import LATER, Config, build_config, setting
from pretrain.common.errors import ConfigError, UnknownSettingError
from pretrain.config import legacy
from pretrain.config.branch import BranchConfig, branch_step
from pretrain.config.data import DataConfig
from pretrain.config.distill import DistillConfig
from pretrain.config.model import ModelConfig
from pretrain.config.optimizer import OptimizerConfig
from pretrain.config.parallel import ParallelConfig
from pretrain.config.phases import PhaseConfig
from pretrain.config.plan import RunPlan
from pretrain.config.schedule import ScheduleConfig
from pretrain.config.train import (
    CheckpointConfig,
    EvalConfig,
    LoggingConfig,
    ProfileConfig,
    SampleConfig,
    TrainConfig,
    ValidationConfig,
)


@dataclass
class InitializeConfig(Config):
    """Start from another run's weights."""

    checkpoint: str
    """A run directory or one of its checkpoints; an imported model is a run directory too."""
    method: Literal["stepwise", "average", "lower"] = setting("stepwise")
    """Which of its blocks become the loop of a recursive model: ``stepwise`` takes equally spaced
    ones, first and last among them, ``average`` means of neighbours, ``lower`` the first ones
    (arXiv 2410.20672)."""
    lora: Literal["svd", "zero"] = setting("svd")
    """Whether the low-rank differences of a loop start from what the loop lost, or from nothing."""
    convert: dict[str, Literal["qkvo", "none"]] = field(default_factory=dict)
    """By a mixer of the model's pattern that its blocks there do not have, what it begins as:
    ``qkvo`` takes over the projections of the attention layer in its place (sizes that are not set
    are that layer's), ``none`` begins anew. Everything but mixers is taken as it is, see
    docs/convert.md."""
    keep: list[int] | None = setting(None, minimum=0)
    """Blocks, counted from 0, that stay attention, where all others become the one mixer of
    ``convert``: makes the model's settings from its own. Null: ``model.pattern`` says it."""


@dataclass
class RunConfig(Config):
    """A training run."""

    # 2: the sizes of all mixers are written out; before, see pretrain/config/legacy.py.
    saved_format: ClassVar[int | None] = legacy.FORMAT

    name: str
    """Name of the run, plain enough for a folder."""
    model: ModelConfig
    """The model."""
    data: DataConfig = field(default_factory=DataConfig)
    """What it is trained on."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate over steps."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Budget, batch and numerics."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How processes share the work."""
    phases: list[PhaseConfig] = field(default_factory=list)
    """Parts of the run, one after another, with other data, lengths, batches or schedules."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """The loss on held-out text."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Tasks while training."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and resuming."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Log and metrics."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Where the time and the memory of some steps go."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """Text generated when the run ends."""
    callbacks: list[str] = field(default_factory=list)
    """Classes of yours that act beside the steps of the run, as ``my_module.MyCallback``."""
    initialize: InitializeConfig | None = None
    """Another run's weights to start from; null: random ones."""
    distill: DistillConfig | None = None
    """A teacher to learn from; null: the text alone."""
    branch: BranchConfig | None = None
    """Another run's step to go on from; null: the run begins anew."""
    directory: str | None = None
    """The run directory; null: ``runs/NAME``."""
    seed: int = setting(0, minimum=0)
    """Seed of initialisation, of the order of the data and of everything drawn in training."""

    @property
    def run_directory(self) -> Path:
        """Return the directory of the run's files."""
        return Path(self.directory or Path("runs") / self.name)

    @property
    def plan(self) -> RunPlan:
        """Return the steps of all phases, with their sizes and learning rates."""
        return RunPlan(self)

    @property
    def frozen(self) -> list[str]:
        """Return the patterns of all parameters that do not learn."""
        return [*self.train.freeze, *([] if self.distill is None else self.distill.freeze)]

    @property
    def first_step(self) -> int:
        """Return the number of steps that are another run's: those before a branch begins."""
        return 0 if self.branch is None else branch_step(self)

    @property
    def kept_steps(self) -> set[int]:
        """Return the steps whose checkpoints ``checkpoint.keep`` asks for."""
        plan = self.plan
        return {plan.step_at(tokens) for tokens in self.checkpoint.keep}


def load_saved_config(path: str | Path) -> RunConfig:
    """Read the ``config.yaml`` that a run wrote into its directory or a checkpoint.

    A run of an earlier version gets the sizes that its mixers had then. Raises ConfigError where
    the file is missing, damaged, or of a later version.
    """
    from pretrain.common.config_files import load_values  # exported models have no yaml

    values = load_values(path)
    legacy.upgrade(values.get("model"), values.pop("format", 1), str(path))
    try:
        return build_config(RunConfig, values, str(path))
    except UnknownSettingError as error:
        raise ConfigError(f"{error}; {LATER}") from None
