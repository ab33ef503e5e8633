"""Every setting of a training run, as dataclasses: the only schema there is."""

from pretrain.common.config_loader import ConfigError, to_yaml
from pretrain.config.checks import check_run_config, load_run_config
from pretrain.config.data import DataConfig, DataSource, PrefixConfig
from pretrain.config.distill import DistillConfig
from pretrain.config.model import MLPConfig, ModelConfig, MoEConfig, RecursionConfig
from pretrain.config.optimizer import OptimizerConfig
from pretrain.config.parallel import ZERO_BACKENDS, ParallelConfig
from pretrain.config.run import (
    InitializeConfig,
    RunConfig,
    load_saved_config,
)
from pretrain.config.schedule import DECAYS, SCHEDULES, ScheduleConfig, learning_rate
from pretrain.config.train import (
    CheckpointConfig,
    EvalConfig,
    LoggingConfig,
    ProfileConfig,
    SampleConfig,
    SpikeConfig,
    TrainConfig,
    ValidationConfig,
)

__all__ = [
    "DECAYS",
    "SCHEDULES",
    "ZERO_BACKENDS",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "DataSource",
    "DistillConfig",
    "EvalConfig",
    "InitializeConfig",
    "LoggingConfig",
    "MLPConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrefixConfig",
    "ProfileConfig",
    "RecursionConfig",
    "RunConfig",
    "SampleConfig",
    "ScheduleConfig",
    "SpikeConfig",
    "TrainConfig",
    "ValidationConfig",
    "check_run_config",
    "learning_rate",
    "load_run_config",
    "load_saved_config",
    "to_yaml",
]
