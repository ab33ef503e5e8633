"""The settings that are planned: of a run, or of a model alone with usual ones assumed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pretrain.common.config_files import load_values
from pretrain.common.errors import UserError
from pretrain.common.shipped_configs import find_config
from pretrain.common.yaml_text import quoted
from pretrain.config import RunConfig, load_run_config
from pretrain.model.build import padded_vocab_size
from pretrain.model.counts import count_model
from pretrain.planner.estimate import Planner

# Assumed for a model without a run.
TOKENS_PER_PARAMETER = 20  # arXiv 2203.15556
ASSUMED = (
    "data.path=none",
    "schedule.warmup_steps=0",
    "train.precision=bf16",
    "train.seq_len=4096",
    "train.global_batch_tokens=1048576",
    "parallel.micro_batch_size=1",
)
CHECKPOINTING = ("none", "selective", "block")


def load_planned(path: str, overrides: list[str]) -> RunConfig:
    """Load a run's settings, or assume them for a model alone.

    A model is planned as a run with the settings of ``ASSUMED`` over 20 tokens per parameter.
    ``7b/rat`` is short for the file of that name in configs/models. Raises UserError.
    """
    path = _model_file(path)
    if "name" in load_values(path, overrides):
        return load_run_config(path, overrides)
    assumed = [f"name={quoted(Path(path).stem)}", *ASSUMED]
    budget = any(x.startswith(("train.steps=", "train.tokens=")) for x in overrides)
    config = load_run_config(path, [*assumed, *overrides, *([] if budget else ["train.steps=1"])])
    if not budget and config.model.vocab_size is not None:
        counts = count_model(config.model, config.model.vocab_size, config.train.seq_len)
        config.train.steps = None
        config.train.tokens = TOKENS_PER_PARAMETER * counts.parameters
    return config


def planned_vocab_size(config: RunConfig, path: str) -> int:
    """Return the vocabulary's size, that of the data where the model does not say.

    Raises UserError naming ``path`` where neither is known.
    """
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    from pretrain.data.batches import open_data

    try:
        tokenizer = open_data(config.data).tokenizer
    except UserError as error:
        raise UserError(
            f"{path}: model.vocab_size is not set, and the data that determines it is missing "
            f"({error}); set model.vocab_size"
        ) from None
    return padded_vocab_size(config.model, config.data.ids(tokenizer.vocab_size))


def assumes_checkpointing(path: str, overrides: list[str]) -> bool:
    """Return whether neither a run nor an override says how much to recompute."""
    if any(x.startswith("train.activation_checkpointing=") for x in overrides):
        return False
    return "name" not in load_values(_model_file(path), overrides)


def choose_checkpointing(planner: Planner, devices: int) -> str:
    """Let the planned run checkpoint as little as fits in memory; return how."""
    config, limit = planner.config, planner.hardware.memory_bytes
    # Segments go with none.
    for kind in CHECKPOINTING if config.train.segment_tokens is None else CHECKPOINTING[:1]:
        estimate = planner.estimate(config.parallel, devices, kind)
        if estimate.peak_memory <= limit:
            break
    else:
        kind = CHECKPOINTING[0]  # none fits, and the report says so
    config.train = dataclasses.replace(
        config.train,
        activation_checkpointing=kind,  # type: ignore[arg-type]
    )
    return kind


def _model_file(path: str) -> str:
    if Path(path).suffix or Path(path).exists():
        return path
    return str(find_config(Path("configs/models") / f"{path}.yaml"))
