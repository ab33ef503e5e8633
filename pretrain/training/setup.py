"""The parts of a run before its first step: vocabulary, engine, state."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pretrain.checkpoint.state import CheckpointState, check_files, load_checkpoint, read_state
from pretrain.common.dtypes import DTYPES
from pretrain.common.errors import UserError
from pretrain.config import DataConfig, RunConfig
from pretrain.config.checks import check_vocab_size
from pretrain.data.batches import PreparedData
from pretrain.data.manifest import Manifest
from pretrain.data.prefixes import check_mask_token
from pretrain.model.build import build_stages, padded_vocab_size
from pretrain.model.carried import CarriedStates
from pretrain.model.counts import ModelCounts
from pretrain.model.float8 import multiply_in_float8
from pretrain.model.language_model import LanguageModel
from pretrain.parallel.processes import (
    data_parallel_rank_and_size,
    on_every_process,
    on_main_process,
    world_size,
)
from pretrain.run_directory import RunDirectory
from pretrain.training.distilling import learn_from_teacher
from pretrain.training.engine import Engine
from pretrain.training.environment import describe_environment
from pretrain.training.freezing import freeze
from pretrain.training.initialization import initialize_from
from pretrain.training.preflight import cells_over_segments


def vocabulary_of(config: RunConfig, data: PreparedData, where: str) -> int:
    """Return the number of rows of the vocabulary.

    Raises UserError, beginning with ``where``, where the tokenizer has more ids or the rows cannot
    be sharded over tensor-parallel processes.
    """
    ids = data.tokenizer.vocab_size
    rows = padded_vocab_size(config.model, config.data.ids(ids))
    check_vocab_size(rows, ids, config.parallel.tensor, where)
    if config.data.prefix is not None:
        check_mask_token(config.data.prefix, rows, data.tokenizer, where)
    return rows


def check_hashes(checkpoint: Path) -> None:
    """Check the sha256 of every file of a checkpoint, sharded over the processes.

    Raises UserError on every process where one has changed. Every process must call.
    """
    rank, size = dist.get_rank(), world_size()
    on_every_process(lambda: check_files(checkpoint, "sha256", rank, size))


def check_data_hashes(data: Sequence[DataConfig], alive: Callable[[], None]) -> None:
    """Check the sha256 of every file of the data, shared out over the processes of each node.

    Nodes may have copies of their own. ``alive`` is called after each file. Raises UserError on
    every process where one has changed. Every process must call.
    """
    parts = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    part = int(os.environ.get("LOCAL_RANK", "0")) % parts

    def check() -> None:
        for directory in dict.fromkeys(part.path for one in data for part in one.directories):
            damaged = Manifest.load(directory).damaged_files(directory, part, parts, alive)
            if damaged:
                more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
                raise UserError(
                    f"data.verify: {'; '.join(damaged[:3])}{more}; bring back the files, or make "
                    "the data again"
                )

    on_every_process(check)


def build_engine(
    config: RunConfig, data: PreparedData, vocab_size: int, checkpoint: Path | None
) -> Engine:
    """Return the engine of this process, with the weights and optimizer state of ``checkpoint``.

    Without one the weights are random, or those that ``initialize`` names.
    """
    train = config.train
    stages = build_stages(
        config.model,
        vocab_size,
        seed=config.seed,
        seq_len=train.seq_len,
        dtype=DTYPES[train.precision],
        activation_checkpointing=train.activation_checkpointing,
        sequence_parallel=config.parallel.sequence,
        context_cells=on_main_process(lambda: cells_over_segments(config, vocab_size)),
        filled=_shard_at_once(config, checkpoint),
    )
    for stage in stages:
        stage.segment_tokens = train.segment_tokens
    if train.precision == "fp8":
        for stage in stages:
            multiply_in_float8(stage, stage.context)
    if config.initialize is not None and checkpoint is None:
        initialize_from(stages, config.initialize, data.tokenizer.sha256)
    freeze(stages, config.frozen)
    recipe = None if config.distill is None else learn_from_teacher(stages, config, data)
    if train.carry_state:  # as of the step before, whose states the checkpoint has
        step = 0 if checkpoint is None else read_state(checkpoint).step
        carry_states(stages, config.plan.phase_at(max(step - 1, 0)).config)
    engine = Engine(stages, config.optimizer, config.parallel)
    engine.recipe = recipe
    if checkpoint is not None:
        load_checkpoint(checkpoint, engine)
    return engine


def carry_states(stages: Sequence[LanguageModel], phase: RunConfig) -> None:
    """Have the rows of a phase of these settings carry states, of which they have none yet."""
    train, rows = phase.train, phase.parallel.micro_batch_size
    _, replicas = data_parallel_rank_and_size()
    micro_batches = train.global_batch_tokens // (train.seq_len * rows * replicas)
    for stage in stages:
        stage.carried = CarriedStates(stage, micro_batches, rows, train.carry_state_noise)


def _shard_at_once(
    config: RunConfig, checkpoint: Path | None
) -> Callable[[nn.Module, torch.dtype], None] | None:
    """Return what shards the model while it is built, or None.

    With ZeRO-3 no process holds all of it, unless it is filled from another run's checkpoint.
    """
    if config.parallel.zero_stage < 3 or (config.initialize is not None and checkpoint is None):
        return None
    from pretrain.optim.backends.deepspeed import shard_parameters

    return shard_parameters


def state_of(
    config: RunConfig,
    data: PreparedData,
    phases: list[dict[str, Any]],
    vocab_size: int,
    checkpoint: Path | None,
) -> CheckpointState:
    """Return the state of a new run, or of one that continues from ``checkpoint``.

    ``phases``: see :func:`pretrain.training.phases.history_of`.
    """
    state = CheckpointState(
        step=0,
        tokens=0,
        seed=config.seed,
        skipped=0,
        vocab_size=vocab_size,
        precision=config.train.precision,
        tokenizer_sha256=data.tokenizer.sha256,
        data=data.identity,
        model=dataclasses.asdict(config.model),
        phases=phases,
    )
    if checkpoint is None:
        return state
    saved = read_state(checkpoint)
    return dataclasses.replace(
        state,
        step=saved.step,
        tokens=saved.tokens,
        skipped=saved.skipped,
        skipped_data=saved.skipped_data,
        data_offset=saved.data_offset,
        rollbacks=saved.rollbacks,
        recent_losses=saved.recent_losses,
        unlogged_loss=saved.unlogged_loss,
        unlogged_steps=saved.unlogged_steps,
        aligned=saved.aligned,
    )


def describe_run(
    directory: RunDirectory, config: RunConfig, counts: ModelCounts, vocab_size: int
) -> None:
    """Write the settings, environment and model of the run into its directory."""
    directory.write_config(config)
    environment = describe_environment(command_and_diff=config.logging.command_and_diff)
    directory.write_environment(environment)
    directory.write_model(
        {
            "parameters": counts.parameters,
            "embedding_parameters": counts.embedding_parameters,
            "training_flops_per_token": counts.training_flops(),
            "vocab_size": vocab_size,
        }
    )
