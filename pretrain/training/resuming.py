"""The checkpoint that a run resumes from, and whether it belongs to the run of the config."""

from __future__ import annotations

from pathlib import Path

from pretrain.checkpoint.state import (
    check_files,
    check_same_model,
    read_state,
    recover_replaced,
)
from pretrain.common.errors import UserError
from pretrain.config import RunConfig, load_saved_config
from pretrain.data.batches import PreparedData
from pretrain.run_directory import (
    CONFIG_FILE,
    RunDirectory,
    find_checkpoint,
    list_checkpoints,
)


def _resumed_from(checkpoint: Path) -> str | None:
    """Return the name that ``checkpoint.resume`` had; None for a damaged checkpoint."""
    try:
        check_files(checkpoint, "size")
    except UserError:
        return None
    return load_saved_config(checkpoint / CONFIG_FILE).checkpoint.resume


def checkpoint_to_resume(config: RunConfig, data: PreparedData, vocab_size: int) -> Path | None:
    """Return the checkpoint to continue from, or None for a new run.

    Everything but the hashes of its files is checked. Raises UserError where it is damaged or of
    another model, tokenizer, data or order of the data than the settings say.
    """
    directory = config.run_directory
    checkpoints = RunDirectory(directory).checkpoints
    recover_replaced(checkpoints)
    if config.checkpoint.resume is None and not list_checkpoints(checkpoints):
        return None
    found = find_checkpoint(
        checkpoints / config.checkpoint.resume if config.checkpoint.resume else directory
    )
    if config.checkpoint.resume:
        # The same command again resumes from its latest checkpoint, not from that step once more.
        latest = find_checkpoint(directory)
        if _resumed_from(latest) == found.name:
            found = latest
    check_files(found, "size")
    state = read_state(found)
    check_same_model(state, config.model, vocab_size, found)
    if state.tokenizer_sha256 != data.tokenizer.sha256:
        raise UserError(
            f"{found} was trained with another tokenizer ({state.tokenizer_sha256[:12]}...) than "
            f"the shards of the config ({data.tokenizer.sha256[:12]}...)"
        )
    before = load_saved_config(found / CONFIG_FILE)
    for name, was, now in (
        ("seed", before.seed, config.seed),
        ("train.seq_len", before.train.seq_len, config.train.seq_len),
        (
            "train.global_batch_tokens",
            before.train.global_batch_tokens,
            config.train.global_batch_tokens,
        ),
        (
            "train.batch_warmup_steps, batch_warmup_start",
            (before.train.batch_warmup_steps, before.train.batch_warmup_start),
            (config.train.batch_warmup_steps, config.train.batch_warmup_start),
        ),
        ("train.precision", before.train.precision, config.train.precision),
        ("data", ", ".join(state.data), ", ".join(data.identity)),
    ):
        if was != now:
            raise UserError(
                f"{directory} was trained with {name} {was}, the config says {now}: resuming would "
                "repeat or skip data; choose another name for a new run"
            )
    return found
