"""The checkpoint that a run resumes from, and whether it belongs to the run of the config."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pretrain.checkpoint.state import (
    CheckpointState,
    check_files,
    check_same_model,
    read_state,
    recover_replaced,
)
from pretrain.checkpoint_folders import checkpoint_step, list_checkpoints
from pretrain.common.config_loader import flattened
from pretrain.common.dtypes import DTYPES
from pretrain.common.errors import UserError
from pretrain.config import RunConfig, load_saved_config
from pretrain.config.plan import RunPlan
from pretrain.data.batches import PreparedData
from pretrain.run_directory import CONFIG_FILE, RunDirectory, find_checkpoint
from pretrain.training.branching import begins_from_trunk, find_trunk_checkpoint, trunk_of
from pretrain.training.phases import difference, history_in

# Where a run is, and how it is resumed, are no part of its result.
_OF_NO_EFFECT = ("name", "directory", "checkpoint.resume", "branch")
_LOOKED_AT = 1000  # steps at which two schedules are compared


def _resumed_from(checkpoint: Path) -> str | None:
    """Return the name that ``checkpoint.resume`` had; None for a damaged checkpoint."""
    try:
        check_files(checkpoint, "size")
    except UserError:
        return None
    return load_saved_config(checkpoint / CONFIG_FILE).checkpoint.resume


def past_of(config: RunConfig) -> tuple[int, list[dict[str, Any]]] | None:
    """Return the step that a run resumes from, and its history there; None for a new run."""
    found = _checkpoint_of(config)
    if found is None:
        return None
    state = read_state(found)
    return state.step, history_in(state, load_saved_config(found / CONFIG_FILE))


def _checkpoint_of(config: RunConfig) -> Path | None:
    """Return the checkpoint that the settings mean, or None. Raises UserError for a damaged one."""
    directory = config.run_directory
    checkpoints = RunDirectory(directory).checkpoints
    recover_replaced(checkpoints)
    branches_off = config.checkpoint.resume is None and begins_from_trunk(config)
    if config.checkpoint.resume is None and not list_checkpoints(checkpoints) and not branches_off:
        return None
    if branches_off:
        directory, found = trunk_of(config).path, find_trunk_checkpoint(config)
    else:
        found = find_checkpoint(
            checkpoints / config.checkpoint.resume if config.checkpoint.resume else directory
        )
    if config.checkpoint.resume:
        # The same command again resumes from its latest checkpoint, not from that step once more.
        latest = find_checkpoint(directory)
        if _resumed_from(latest) == found.name:
            found = latest
    check_files(found, "size")
    return found


def checkpoint_to_resume(
    config: RunConfig,
    data: PreparedData,
    phases: list[dict[str, Any]],
    vocab_size: int,
    *,
    force: bool = False,
) -> Path | None:
    """Return the checkpoint to continue from, or None for a new run.

    ``phases``: see :func:`pretrain.training.phases.history_of`; those before the checkpoint must be
    the same. Everything but the hashes of its tensors is checked. Raises UserError where it is
    damaged or of another model, tokenizer, data or order of the data than the settings say; and,
    unless ``force``, where the learning rate would rise above that of the settings it was trained
    with.
    """
    found = _checkpoint_of(config)
    if found is None:
        return None
    branches_off = config.checkpoint.resume is None and begins_from_trunk(config)
    directory = trunk_of(config).path if branches_off else config.run_directory
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
        (
            "train.batch_warmup_steps, batch_warmup_start",
            (before.train.batch_warmup_steps, before.train.batch_warmup_start),
            (config.train.batch_warmup_steps, config.train.batch_warmup_start),
        ),
        (
            "train.carry_state, carry_steps",
            (before.train.carry_state, before.train.carry_steps),
            (config.train.carry_state, config.train.carry_steps),
        ),
        # In fp8 a model has the weights of one in bf16.
        *(
            [("train.precision", before.train.precision, config.train.precision)]
            if DTYPES[before.train.precision] != DTYPES[config.train.precision]
            else []
        ),
        difference(history_in(state, before), phases, state.step) or ("", None, None),
    ):
        if was != now:
            raise UserError(
                f"{directory} was trained with {name} {was}, the config says {now}: "
                + ("a branch" if branches_off else "resuming")
                + " would repeat or skip data; "
                + ("expected its trunk's" if branches_off else "choose another name for a new run")
            )
    _check_what_learns(found, before, config, state.step)
    shards, now_shards = before.parallel.tensor, config.parallel.tensor
    if config.train.carry_state and shards != now_shards:
        raise UserError(
            f"{found}: the states that rows carry (train.carry_state) are those of parallel.tensor "
            f"{shards}, the config says {now_shards}; expected the same to resume, or a new run "
            f"with initialize.checkpoint={found}"
        )
    rise = _rise(found, config)
    if rise is not None and not force:
        raise UserError(_refuse_rise(found, config, *rise))
    return found


def _check_what_learns(checkpoint: Path, before: RunConfig, config: RunConfig, step: int) -> None:
    """Raise UserError where other parameters learned before ``step`` than the settings say."""
    aligned = [min(c.plan.aligned_steps, step) for c in (before, config)]
    for name, was, now in (
        ("train.freeze and distill.freeze", sorted(before.frozen), sorted(config.frozen)),
        ("distill.align_steps, in steps so far,", *aligned),
    ):
        if was != now:
            raise UserError(
                f"{checkpoint} was trained with {name} {was}, the config says {now}; expected the "
                f"same to resume, or a new run with initialize.checkpoint={checkpoint}"
            )


def describe_changes(checkpoint: Path, config: RunConfig) -> str | None:
    """Return each setting that is another one than when the checkpoint was saved, a line each.

    None where there is none.
    """
    before = load_saved_config(checkpoint / CONFIG_FILE)
    lines = [f"  {name}: {was} -> {now}" for name, was, now in _changes(before, config)]
    rise = _rise(checkpoint, config)
    if rise is not None:
        lines.append(f"  learning rate: {rise[0]:.3g} -> {rise[1]:.3g}")
    lines += _other_rules(read_state(checkpoint), config)
    return "\n".join(["settings that have changed since then:", *lines]) if lines else None


def _other_rules(state: CheckpointState, config: RunConfig) -> list[str]:
    """Return lines on what this version trains otherwise than the one that wrote a checkpoint."""
    if state.save:  # earlier versions did not number their saves
        return []
    model, base = config.model, config.model.mup_base_hidden_size
    lines = []
    if base not in (None, model.hidden_size):
        lines.append(
            "  model.mup_base_hidden_size: rates and weight decay are those of docs/training.md, "
            "not of the earlier version that saved it"
        )
    if model.moe is not None and model.moe.capacity_factor is not None:
        lines.append(
            "  model.moe.capacity_factor: an expert drops the last tokens of a sequence, where the "
            "earlier version dropped those of least weight in a micro-batch"
        )
    return lines


def _changes(before: RunConfig, config: RunConfig) -> list[tuple[str, Any, Any]]:
    was, now = (_settings(c) for c in (before, config))
    return [
        (name, was.get(name), now.get(name))
        for name in sorted({*was, *now})
        if was.get(name) != now.get(name) and not name.startswith(_OF_NO_EFFECT)
    ]


def _settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings by their dotted names, those of each phase too."""
    values = dataclasses.asdict(config)
    phases = values.pop("phases")
    for number, phase in enumerate(phases):
        values[f"phases[{number}]"] = phase
    return flattened(values)


def _rise(checkpoint: Path, config: RunConfig) -> tuple[float, float] | None:
    """Return learning rates that the checkpoint's settings planned, and to which it rises now.

    Those are of the next step, where it goes above both the planned one and that of the step
    before; else the highest to come, as where another warm-up undoes an anneal. None where neither
    rises.
    """
    before, step = load_saved_config(checkpoint / CONFIG_FILE), read_state(checkpoint).step
    if step == 0 or step >= config.plan.num_steps:
        return None

    def highest(plan: RunPlan, steps: range) -> float:
        """Return the highest rate of ``steps``, of which those beyond the last are the last."""
        return max(plan.learning_rate(min(s, plan.num_steps - 1)) for s in steps)

    was, now = before.plan, config.plan
    ends = (step + 1, max(was.num_steps, now.num_steps))
    for end in ends:
        apart = max(1, (end - step) // _LOOKED_AT)
        planned = highest(was, range(step - 1, end, apart))
        wanted = highest(now, range(step, end, apart))
        if wanted > planned * (1 + 1e-3):
            return planned, wanted
    return None


def _refuse_rise(checkpoint: Path, config: RunConfig, before: float, wanted: float) -> str:
    saved = load_saved_config(checkpoint / CONFIG_FILE)
    changes = "; ".join(
        f"{name} {was} -> {now}"
        for name, was, now in _changes(saved, config)
        if name.startswith(("schedule.", "optimizer.lr", "train.steps", "train.tokens", "phases"))
    )
    return (
        f"{checkpoint}: the learning rate would rise to {wanted:.3g} after step "
        f"{checkpoint_step(checkpoint)}, where its schedule had planned {before:.3g} ({changes}); "
        "branch off "
        f"with {_branch(checkpoint, config)}, or go on all the same with --force"
    )


def how_to_extend(checkpoint: Path, config: RunConfig) -> str:
    """Return what else the command needs that continues from ``checkpoint`` by longer settings."""
    if _rise(checkpoint, config) is None:
        return ""
    return f" with {_branch(checkpoint, config)}, or from its decayed learning rate with --force,"


def _branch(checkpoint: Path, config: RunConfig) -> str:
    """Return the overrides by which a run goes on from where the learning rate does not rise."""
    for path in list_checkpoints(checkpoint.parent):
        if path.name < checkpoint.name and _rises_not(path, config):
            return f"checkpoint.resume={path.name}, from before the decay"
    return f"name=NEW initialize.checkpoint={checkpoint}, a new run from its weights"


def _rises_not(checkpoint: Path, config: RunConfig) -> bool:
    try:
        check_files(checkpoint, "size")
        return _rise(checkpoint, config) is None
    except UserError:
        return False
