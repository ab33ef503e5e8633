"""Check which runs can compute their rows segment by segment."""

from __future__ import annotations

from pretrain.common.config_loader import ConfigError
from pretrain.config.run import RunConfig


def check_segments(config: RunConfig, where: str) -> None:
    """Raise ConfigError where ``train.segment_tokens`` is set and something does not go with it."""
    train, parallel, model = config.train, config.parallel, config.model
    size = train.segment_tokens
    if size is None:
        return
    found = f"{where}: train.segment_tokens is {size}"
    row = train.seq_len * parallel.micro_batch_size
    if row % size:
        raise ConfigError(
            f"{found}, expected a divisor of the row's seq_len x micro_batch_size = {row} tokens"
        )
    if parallel.sequence and size % parallel.tensor:
        raise ConfigError(
            f"{found}, expected a multiple of parallel.tensor = {parallel.tensor}, over which "
            "parallel.sequence shards the tokens"
        )
    capacity = None if model.moe is None else model.moe.capacity_factor
    for name, value, expected in (
        ("train.activation_checkpointing", train.activation_checkpointing, "none"),
        ("parallel.pipeline", parallel.pipeline, 1),
        ("parallel.context", parallel.context, 1),
        ("parallel.zero_backend", parallel.zero_backend, "megatron"),
        ("model.moe.capacity_factor", capacity, None),
        ("model.recursion", None if model.recursion is None else "set", None),
    ):
        if value != expected:
            wanted = "null" if expected is None else expected
            raise ConfigError(f"{found} and {name} {value}, expected {name} {wanted} with segments")
