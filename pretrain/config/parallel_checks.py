"""Checks of the layout of processes, whatever their number."""

from __future__ import annotations

from pretrain.common.config_loader import ConfigError
from pretrain.config.run import RunConfig


def check_parallel(config: RunConfig, where: str) -> None:
    """Check the settings of ``parallel`` against each other. Raises ConfigError."""
    parallel = config.parallel
    row = config.train.seq_len
    if parallel.sequence and (parallel.tensor == 1 or row % parallel.tensor):
        raise ConfigError(
            f"{where}: parallel.sequence shards the train.seq_len = {row} tokens of a sequence "
            f"over parallel.tensor processes, found {parallel.tensor}; expected a divisor above 1"
        )
    _check_context(config, where)
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise ConfigError(
            f"{where}: parallel.virtual_pipeline is {parallel.virtual_pipeline}, which needs "
            "parallel.pipeline above 1"
        )
    stage, backend = parallel.zero_stage, parallel.zero_backend
    if stage > 1 and parallel.pipeline > 1:
        raise ConfigError(
            f"{where}: parallel.zero_stage is {stage} with parallel.pipeline {parallel.pipeline}: "
            "gradients that are sharded as soon as they are made cannot add up over a pipeline's "
            "micro-batches; expected zero_stage 0 or 1, or pipeline 1"
        )
    if stage > 1 and backend != "deepspeed":
        raise ConfigError(
            f"{where}: parallel.zero_stage is {stage}, which the {backend} backend does not have; "
            "expected 0 or 1, or parallel.zero_backend=deepspeed"
        )
    if backend == "deepspeed" and stage == 0 and config.train.precision != "float32":
        raise ConfigError(
            f"{where}: parallel.zero_stage is 0 with DeepSpeed, which in {config.train.precision} "
            "shards the optimizer's state anyway; expected zero_stage 1, or zero_backend=megatron"
        )
    if parallel.offload != "device" and (backend != "deepspeed" or stage == 0):
        raise ConfigError(
            f"{where}: parallel.offload is {parallel.offload}, expected device, or "
            "parallel.zero_backend=deepspeed with parallel.zero_stage 1 to 3"
        )
    if parallel.offload == "nvme" and stage < 3:
        raise ConfigError(
            f"{where}: parallel.offload is nvme with parallel.zero_stage {stage}, expected 3: "
            "DeepSpeed moves no other state to files; or offload=cpu"
        )
    if parallel.offload == "nvme" and config.logging.blocks:
        raise ConfigError(
            f"{where}: logging.blocks is {config.logging.blocks} with parallel.offload nvme, "
            "expected 0: gradients and weights are in files between the passes and the update"
        )
    if (parallel.offload == "nvme") != (parallel.offload_path is not None):
        raise ConfigError(
            f"{where}: parallel.offload is {parallel.offload} and parallel.offload_path "
            f"{parallel.offload_path}, expected a folder on a local disk with offload=nvme alone"
        )


def _check_context(config: RunConfig, where: str) -> None:
    """Check what goes with segments of rows."""
    parallel = config.parallel
    if parallel.context == 1:
        return
    row = config.train.seq_len  # validation may have micro-batches of one
    parts = parallel.context * (parallel.tensor if parallel.sequence else 1)
    if row % parts:
        sequence = " x parallel.tensor" if parallel.sequence else ""
        raise ConfigError(
            f"{where}: parallel.context is {parallel.context}, but parallel.context{sequence} = "
            f"{parts} does not divide the train.seq_len = {row} tokens of a sequence; expected a "
            "divisor"
        )
    if parallel.zero_backend != "megatron":
        raise ConfigError(
            f"{where}: parallel.context is {parallel.context}, which the {parallel.zero_backend} "
            "backend does not have; expected 1, or parallel.zero_backend=megatron with zero_stage "
            "0 or 1"
        )
    if config.model.moe is not None and config.model.moe.capacity_factor is not None:
        raise ConfigError(
            f"{where}: parallel.context is {parallel.context} with model.moe.capacity_factor "
            f"{config.model.moe.capacity_factor}, which counts the tokens of full sequences; "
            "expected null"
        )
    if config.train.precision == "fp8":
        raise ConfigError(
            f"{where}: parallel.context is {parallel.context} with train.precision fp8, whose "
            "scales are those of whole micro-batches; expected bf16 or float32"
        )
