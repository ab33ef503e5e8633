"""The teacher of a run: its stages beside the student's, and what each step learns from it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pretrain.checkpoint.state import CheckpointState, check_files, load_weights, read_state
from pretrain.checkpoint.teacher import HF, find_teacher, imported_teacher
from pretrain.common.errors import ConfigError, UserError
from pretrain.config import RunConfig
from pretrain.data.batches import PreparedData
from pretrain.model.build import fill_units, split_like
from pretrain.model.distillation import Distillation, Recipe, mark_waiting
from pretrain.model.language_model import LanguageModel
from pretrain.model.layout import check_tensor_parallel
from pretrain.model.spec import block_specs
from pretrain.parallel.processes import on_main_process
from pretrain.run_directory import find_checkpoint

# Variables by which a process would take itself for one of several.
_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def learn_from_teacher(
    stages: Sequence[LanguageModel], config: RunConfig, data: PreparedData
) -> Callable[[int], Recipe]:
    """Put the teacher's stages beside those of the model; return what tells a step's recipe.

    Every process must call. Raises UserError where the teacher does not fit.
    """
    distill = config.distill
    assert distill is not None
    plan, vocabulary = config.plan, data.tokenizer.vocab_size
    new: set[int] = set()
    if distill.cache is not None:
        for stage in stages:
            stage.distilled = Distillation(stage, None, vocabulary)
    else:
        checkpoint, state = open_teacher(config, data.tokenizer.sha256)
        if plan.aligned_steps:
            new = new_blocks(stages[0], state, checkpoint)
        teachers = load_teacher(stages, checkpoint, state, config.train.seq_len)
        for stage, teacher in zip(stages, teachers, strict=True):
            stage.distilled = Distillation(stage, teacher, vocabulary, new)
            if new:
                mark_waiting(stage, new)
    aligned = plan.aligned_steps if new else 0

    def recipe(step: int) -> Recipe:
        settings = plan.phase_at(step).config.distill or distill
        return Recipe(
            step < aligned,
            settings.weight,
            settings.temperature,
            settings.reverse,
            settings.align_weight,
        )

    return recipe


def open_teacher(config: RunConfig, tokenizer_sha256: str) -> tuple[Path, CheckpointState]:
    """Return the teacher's checkpoint, imported if need be, and its state; every process must call.

    Raises UserError where it is damaged, or reads text by another tokenizer than the data's.
    """
    checkpoint = on_main_process(lambda: _find(config))
    state = read_state(checkpoint)
    if state.tokenizer_sha256 != tokenizer_sha256:
        raise UserError(
            f"distill.teacher {checkpoint} has another tokenizer "
            f"({state.tokenizer_sha256[:12]}...) than the data ({tokenizer_sha256[:12]}...); "
            f"prepare the data with tokenizer: {{path: {checkpoint}}}"
        )
    return checkpoint, state


def _find(config: RunConfig) -> Path:
    checkpoint = find_teacher(config)
    try:
        if checkpoint is None:
            assert config.distill is not None
            _import(config.distill.teacher.removeprefix(HF), imported_teacher(config))
            checkpoint = find_checkpoint(imported_teacher(config))
        check_files(checkpoint)
    except UserError as error:
        raise UserError(f"distill.teacher: {error}") from None
    return checkpoint


def _import(name: str, folder: Path) -> None:
    """Make a run directory of a Hugging Face model, in a process that is none of this run's."""
    environment = {k: v for k, v in os.environ.items() if k not in _OF_LAUNCHERS}
    command = [sys.executable, "-m", "pretrain", "import", name, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(lines[-1] if lines else f"{name} could not be imported")


def load_teacher(
    stages: Sequence[LanguageModel], checkpoint: Path, state: CheckpointState, seq_len: int
) -> list[LanguageModel]:
    """Return the teacher, divided as the model whose ``stages`` are this process's.

    It is in evaluation mode and needs no gradient. Raises UserError where its layers cannot be
    divided in that way.
    """
    where, context = f"distill.teacher {checkpoint}", stages[0].context
    try:
        check_tensor_parallel(state.model_config, context.tensor_size, where)
        if state.vocab_size % context.tensor_size:
            raise ConfigError(
                f"{where} has a vocabulary of {state.vocab_size} rows, which parallel.tensor "
                f"{context.tensor_size} does not divide"
            )
        teachers = split_like(stages, state.model_config, state.vocab_size, seq_len, where)
    except ConfigError as error:
        raise UserError(str(error)) from None
    for teacher in teachers:
        for _ in fill_units(teacher, seed=0):
            pass
        teacher.requires_grad_(False)
        teacher.eval()
        if teacher.recursion is not None:
            teacher.recursion.in_step = context.context_size > 1 or context.expert_size > 1
        load_weights(checkpoint, teacher)
    return teachers


def new_blocks(model: LanguageModel, state: CheckpointState, checkpoint: Path) -> set[int]:
    """Return the blocks whose mixers the teacher does not have in their places.

    Raises UserError where blocks cannot be compared one by one.
    """
    mine, its = model.model_config, state.model_config
    wanted, there = block_specs(mine), block_specs(its)
    for name, own, other in (
        ("model.hidden_size", mine.hidden_size, its.hidden_size),
        ("blocks", len(wanted), len(there)),
        ("model.recursion", mine.recursion, None),
        ("model.recursion", None, its.recursion),
    ):
        if own != other:
            raise UserError(
                f"distill.align_steps aligns blocks one by one, but the model has {name} {own} and "
                f"the teacher {checkpoint} {other}; expected the same, without loops, or "
                "distill.align_steps 0"
            )
    return {
        index
        for index, (own, other) in enumerate(zip(wanted, there, strict=True))
        if (own.mixer, own.identity) != (other.mixer, other.identity)
    }
