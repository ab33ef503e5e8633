"""A whole training run; see :func:`load_run_config`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.common.config_loader import load_config, setting
from pretrain.config.data import DataConfig
from pretrain.config.model import ModelConfig
from pretrain.config.optimizer import OptimizerConfig, ScheduleConfig
from pretrain.config.parallel import ParallelConfig
from pretrain.config.train import (
    CheckpointConfig,
    EvalConfig,
    LoggingConfig,
    SampleConfig,
    TrainConfig,
    ValidationConfig,
)


@dataclass
class InitializeConfig:
    """Start from another run's weights. checkpoint: a run directory or one of its checkpoints;
    method: which of its blocks become the loop of a recursive model: ``stepwise`` (equally spaced,
    first and last among them), ``average`` or ``lower`` (the first ones); lora: ``svd`` starts the
    low-rank differences from what the loop lost, ``zero`` from nothing."""

    checkpoint: str
    method: str = setting("stepwise", choices=("stepwise", "average", "lower"))
    lora: str = setting("svd", choices=("svd", "zero"))


@dataclass
class RunConfig:
    """A training run. directory: null = runs/NAME; initialize: null = random weights."""

    name: str
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    initialize: InitializeConfig | None = None
    directory: str | None = None
    seed: int = setting(0, minimum=0)

    @property
    def run_directory(self) -> Path:
        return Path(self.directory or Path("runs") / self.name)


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, extend, override and check a run's settings. Raises ConfigError."""
    from pretrain.config.checks import check_run_config

    config = load_config(RunConfig, path, overrides)
    check_run_config(config, str(path))
    return config


def load_saved_config(path: str | Path) -> RunConfig:
    """Read the ``config.yaml`` that a run wrote into its directory or a checkpoint.

    Raises ConfigError where the file is missing or damaged.
    """
    return load_config(RunConfig, path)
