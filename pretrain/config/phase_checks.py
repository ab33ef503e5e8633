"""Check how the batches and phases of a run go together."""

from __future__ import annotations

from pretrain.common.config_loader import ConfigError
from pretrain.config.run import RunConfig


def check_phases(config: RunConfig, where: str) -> None:
    """Check what every phase of a run changes against the other phases. Raises ConfigError."""
    train, data, phases = config.train, config.data, config.phases
    lengths = [train.seq_len] if not phases else [p.seq_len or train.seq_len for p in phases]
    window = data.window or max(lengths)
    for number, length in enumerate(lengths):
        if window % length:
            name = f"phases[{number}].seq_len" if phases else "train.seq_len"
            what = "data.window" if data.window else "the longest seq_len"
            raise ConfigError(
                f"{where}: {name} is {length}, expected a divisor of {what} = {window}: shorter "
                "sequences are pieces of the longest ones' windows"
            )
    if data.packing == "best_fit" and {window, *lengths} != {lengths[0]}:
        raise ConfigError(
            f"{where}: data.packing is best_fit, which packs sequences of one length, with "
            f"sequences or a data.window of {', '.join(map(str, sorted({window, *lengths})))} "
            "tokens; expected one length, or concatenate"
        )
    if train.carry_state:
        _check_rows_that_read_on(config, window, where)
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
    if config.parallel.zero_backend == "megatron":
        return
    for number, phase in enumerate(phases):
        for name, value, own in (
            ("global_batch_tokens", phase.global_batch_tokens, train.global_batch_tokens),
            ("seq_len", phase.seq_len, train.seq_len),
            ("micro_batch_size", phase.micro_batch_size, config.parallel.micro_batch_size),
        ):
            if value not in (None, own):
                raise ConfigError(
                    f"{where}: phases[{number}].{name} is {value}, but DeepSpeed is set up for one "
                    f"number of micro-batches; expected {own}, or parallel.zero_backend=megatron"
                )


def _check_rows_that_read_on(config: RunConfig, window: int, where: str) -> None:
    """Refuse what changes rows that carry their states from step to step."""
    if config.data.packing != "concatenate" or window != config.train.seq_len:
        raise ConfigError(
            f"{where}: train.carry_state is true with data.packing {config.data.packing} and a "
            f"data.window of {window}, expected concatenate and train.seq_len = "
            f"{config.train.seq_len}: carried states need rows that read on"
        )
    for number, phase in enumerate(config.phases):
        for name in ("data", "seq_len", "global_batch_tokens", "micro_batch_size"):
            if getattr(phase, name) is not None:
                raise ConfigError(
                    f"{where}: train.carry_state is true with phases[{number}].{name} set, "
                    "expected phases that change the learning rate alone: carried states need the "
                    "same rows in every step"
                )


def check_batch_warmup(config: RunConfig, where: str) -> None:
    """Check the warm-up of a run's batches, or of those of one of its phases."""
    train, parallel = config.train, config.parallel
    start, steps = train.batch_warmup_start, train.batch_warmup_steps
    if start is None:
        return
    micro_batch = train.seq_len * parallel.micro_batch_size
    if start % micro_batch:
        raise ConfigError(
            f"{where}: train.batch_warmup_start is {start}, expected a multiple of seq_len x "
            f"micro_batch_size = {micro_batch}"
        )
    if parallel.zero_backend != "megatron":
        raise ConfigError(
            f"{where}: train.batch_warmup_steps is {steps}, but DeepSpeed is set up for one number "
            "of micro-batches; expected 0, or parallel.zero_backend=megatron"
        )
