"""Check how the batches and phases of a run go together."""

from __future__ import annotations

from pretrain.common.config_loader import ConfigError
from pretrain.config.run import RunConfig


def check_phases(config: RunConfig, where: str) -> None:
    """Check what every phase of a run changes against the other phases. Raises ConfigError."""
    train, data, phases = config.train, config.data, config.phases
    lengths = [train.seq_len] if not phases else [p.seq_len or train.seq_len for p in phases]
    window = data.window or max(lengths)
    packs = data.packing == "best_fit"
    if packs and data.window not in (None, *lengths):
        raise ConfigError(
            f"{where}: data.window is {data.window} with data.packing best_fit, expected null: "
            "documents are packed into sequences, not cut out of windows"
        )
    for number, length in enumerate(lengths):
        if window % length and not packs:
            name = f"phases[{number}].seq_len" if phases else "train.seq_len"
            what = "data.window" if data.window else "the longest seq_len"
            raise ConfigError(
                f"{where}: {name} is {length}, expected a divisor of {what} = {window}: shorter "
                "sequences are pieces of the longest ones' windows"
            )
    if train.carry_state and packs:
        raise ConfigError(
            f"{where}: train.carry_state is true with data.packing best_fit, expected concatenate: "
            "carried states need rows that read on"
        )
    if not phases:
        return
    names = [p.name for p in phases if p.name is not None]
    for name in names:
        if not name or "/" in name or names.count(name) > 1:
            raise ConfigError(
                f"{where}: phases has a name '{name}', expected plain names, each once"
            )
    if train.batch_warmup_start is not None and any(p.global_batch_tokens for p in phases):
        raise ConfigError(
            f"{where}: train.batch_warmup_steps is {train.batch_warmup_steps} with phases that set "
            "global_batch_tokens; expected 0, and the warm-up as phases"
        )


def check_batch_warmup(config: RunConfig, where: str) -> None:
    """Check the warm-up of a run's batches, or of those of one of its phases."""
    train, parallel = config.train, config.parallel
    start = train.batch_warmup_start
    if start is None:
        return
    micro_batch = train.seq_len * parallel.micro_batch_size
    if start % micro_batch:
        raise ConfigError(
            f"{where}: train.batch_warmup_start is {start}, expected a multiple of seq_len x "
            f"micro_batch_size = {micro_batch}"
        )
