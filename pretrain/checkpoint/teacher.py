"""The checkpoint of a run's teacher, and what it adds to the run's work."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pretrain.checkpoint.state import CheckpointState, read_state
from pretrain.common.errors import UserError
from pretrain.config import RunConfig
from pretrain.model.counts import ModelCounts, count_model
from pretrain.run_directory import find_checkpoint

HF = "hf:"


def imported_teacher(config: RunConfig) -> Path:
    """Return the folder that a Hugging Face teacher of a run is imported to."""
    return config.run_directory / "teacher"


def find_teacher(config: RunConfig) -> Path | None:
    """Return the checkpoint of a run's teacher; None for one that is still to be imported.

    Raises UserError where there is none.
    """
    distill = config.distill
    assert distill is not None
    path = Path(distill.teacher)
    if distill.teacher.startswith(HF):
        path = imported_teacher(config)
        if not path.exists():
            return None
    try:
        return find_checkpoint(path)
    except UserError as error:
        raise UserError(f"distill.teacher: {error}") from None


def teacher_beside(config: RunConfig) -> CheckpointState | None:
    """Return the state of the teacher that runs beside a run's model, if it is known."""
    if config.distill is None or config.distill.cache is not None:
        return None
    checkpoint = find_teacher(config)
    return None if checkpoint is None else read_state(checkpoint)


def count_run(config: RunConfig, vocab_size: int, seq_len: int) -> ModelCounts:
    """Count a run's model as :func:`.count_model` does, and the FLOPs of a teacher beside it."""
    counts, teacher = count_model(config.model, vocab_size, seq_len), teacher_beside(config)
    if teacher is None:
        return counts
    found = count_model(teacher.model_config, teacher.vocab_size, seq_len)
    return dataclasses.replace(counts, teacher_flops=found.flops_per_token)
