"""Checkpoints: complete or absent, checked before use, loadable under any layout of processes.

``checkpoints/step-N/`` holds the tensors (weights, optimizer state; see storage.py), the
resolved ``config.yaml``, ``state.json`` and ``files.json``, the size and sha256 of every file.
It is written under another name, flushed to disk, and renamed; ``latest`` is written after that.
Every save has a number, by which the last one is found even where ``latest`` was cut off.
The data position, the schedule and the random numbers are functions of the step, so the step is
their state.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pretrain.checkpoint.sharded_state import (
    HoldsState,
    State,
    StorageError,
    full_part,
    optimizer_key,
    weights_state,
)
from pretrain.checkpoint.storage import FORMATS, load_state
from pretrain.checkpoint_folders import STATE_FILE, list_checkpoints
from pretrain.common.config_loader import LATER, build_config, flattened
from pretrain.common.errors import ConfigError, UnknownSettingError, UserError
from pretrain.common.files import file_sha256
from pretrain.config import ModelConfig, legacy, load_saved_config
from pretrain.model.freezing import matches
from pretrain.model.spec import block_specs
from pretrain.run_directory import CONFIG_FILE

_READ_FIRST = {STATE_FILE, CONFIG_FILE}  # before the tensors, and always hashed


@dataclass
class CheckpointState:
    """The metadata of a checkpoint, its ``state.json``.

    Attributes:
        step: Optimizer steps done.
        skipped: Steps skipped for a loss or gradient that was not finite, or for a spike.
        data_offset: Tokens of data that rollbacks skipped.
        skipped_data: The same by the step from which they were skipped; earlier versions have
            none.
        phases: What the order of the data of each phase depends on, see
            :func:`pretrain.training.phases.history_of`; earlier versions have none.
        recent_losses: See :class:`pretrain.training.spikes.SpikeDetector`.
        save: Number of this save among those of the run, given when it is written; 0 in earlier
            versions, which gave none.
        unlogged_loss: Sum of the losses of the applied steps since the log's last line, each
            weighted by its batch as a share of ``train.global_batch_tokens``.
        unlogged_steps: Sum of those weights.
        aligned: Updates among the steps that aligned new mixers with a teacher alone.
    """

    step: int
    tokens: int
    seed: int
    skipped: int
    vocab_size: int
    precision: str
    tokenizer_sha256: str
    data: list[str]
    model: dict[str, Any]
    data_offset: int = 0
    rollbacks: int = 0
    recent_losses: list[float] = field(default_factory=list)
    save: int = 0
    unlogged_loss: float = 0.0
    unlogged_steps: float = 0.0
    aligned: int = 0
    skipped_data: list[list[int]] = field(default_factory=list)
    phases: list[dict[str, Any]] = field(default_factory=list)
    format: int = legacy.FORMAT  # of ``model``, see pretrain/config/legacy.py

    @property
    def offset(self) -> tuple[tuple[int, int], ...]:
        """Return the data that rollbacks skipped, for the batches of the next step."""
        skipped = self.skipped_data or [[0, self.data_offset]] * (self.data_offset > 0)
        return tuple((step, tokens) for step, tokens in skipped)

    @property
    def model_config(self) -> ModelConfig:
        """Return the model's settings; an earlier format's get the default sizes of its time."""
        return _model_config(self, "checkpoint")


def _model_config(state: CheckpointState, where: str) -> ModelConfig:
    model = dict(state.model)
    legacy.upgrade(model, state.format, where)
    return build_config(ModelConfig, model, f"{where}, model")


def recover_replaced(directory: Path) -> None:
    """Bring back a checkpoint whose replacement was cut off between the two renames."""
    for old in directory.glob(".writing-old-step-*"):
        final = old.with_name(old.name.removeprefix(".writing-old-"))
        if not final.exists():
            old.rename(final)


def check_files(checkpoint: Path, how: str = "sha256", rank: int = 0, size: int = 1) -> None:
    """Raise UserError naming the first file that is missing, cut short or altered.

    ``how``: ``sha256`` hashes every file, each of ``size`` processes every ``size``-th; ``size``
    only those that are read before the tensors.
    """
    damage = _find_damage(checkpoint, how, rank, size)
    if damage is not None:
        raise _damaged(checkpoint, damage)


def _find_damage(checkpoint: Path, how: str, rank: int = 0, size: int = 1) -> str | None:
    try:
        listed = json.loads((checkpoint / "files.json").read_bytes())
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in listed.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return "files.json is missing or unreadable"
    indexed = any(index in expected for index in FORMATS.values())
    if not (indexed and expected.keys() >= _READ_FIRST):
        return "files.json does not list what a checkpoint is made of"
    for number, (name, (length, sha256)) in enumerate(expected.items()):
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            return f"{name} is missing"
        if found != length:
            return f"{name} has {found} bytes, expected {length}"
        hashed = (how == "sha256" and number % size == rank) or name in _READ_FIRST
        if hashed and file_sha256(path) != sha256:
            return f"{name} has changed since it was written (sha256)"
    return None


def _damaged(checkpoint: Path, what: str) -> UserError:
    earlier = [p for p in list_checkpoints(checkpoint.parent) if p.name < checkpoint.name]
    whole = next((p for p in earlier if _find_damage(p, "size") is None), None)
    offer = (
        f"the one before it is {whole}: resume from it with checkpoint.resume={whole.name}"
        if whole is not None
        else "there is no earlier one that is whole"
        if earlier
        else "there is no earlier one"
    )
    return UserError(f"checkpoint {checkpoint} is damaged: {what}; {offer}")


def read_state(checkpoint: Path) -> CheckpointState:
    """Return the metadata of a checkpoint, without loading it."""
    path = checkpoint / "state.json"
    try:
        values = {"format": 1, **json.loads(path.read_bytes())}
    except (OSError, ValueError, TypeError):
        raise _damaged(checkpoint, f"{STATE_FILE} is missing or unreadable") from None
    try:
        state = build_config(CheckpointState, values, str(path))
        _model_config(state, str(path))
    except UnknownSettingError as error:
        raise ConfigError(f"{error}; {LATER}") from None
    return state


# Settings of a model that say how it begins or is trained, not what it computes.
_NOT_THE_MODEL = {
    "init_std",
    "depth_scaled_init",
    "z_loss_weight",
    "dropout",
    "moe.balance_weight",
    "moe.z_loss_weight",
}


def check_same_model(
    state: CheckpointState, model: ModelConfig, vocab_size: int, checkpoint: Path
) -> None:
    """Raise UserError naming each setting in which the checkpoint's model is another one."""
    # Defaults written out and defaults not set are the same model.
    saved, wanted = (_model_settings(m) for m in (state.model_config, model))
    saved["vocab_size"], wanted["vocab_size"] = state.vocab_size, vocab_size
    differences = [
        f"model.{key} is {saved.get(key)} there and {wanted.get(key)} here"
        for key in sorted({*saved, *wanted})
        if saved.get(key) != wanted.get(key) and key not in _NOT_THE_MODEL
    ]
    if differences:
        raise UserError(f"{checkpoint} holds another model: {'; '.join(differences)}")


def _model_settings(model: ModelConfig) -> dict[str, Any]:
    """Return every setting of a model by its dotted name, with those of its mixers filled in."""
    settings = dataclasses.asdict(model)
    settings["mlp"] = {"kind": model.mlp.kind, "width": model.mlp.width(model.hidden_size)}
    specs = {spec.name: spec for spec in block_specs(model)}
    settings["mixers"] = {name: spec.identity for name, spec in specs.items()}
    return flattened(settings)


def load_checkpoint(checkpoint: Path, engine: HoldsState, *, carried: bool = True) -> None:
    """Load weights and optimizer state into an engine whose model has the checkpoint's shape.

    ``carried``: also what rows carry, of which the engine has as many.
    """
    state = read_state(checkpoint)
    _load(engine.backend.weights_state(saving=False), checkpoint)
    _load(engine.backend.optimizer_state(saving=False), checkpoint)
    states = engine.carried_state() if carried else {}
    if states:
        _load(states, checkpoint)
    engine.backend.loaded(state.step - state.skipped, state.aligned)


def load_weights(checkpoint: Path, model: nn.Module, *, averaged: bool = False) -> None:
    """Load weights alone, for evaluation.

    ``averaged``: those averaged over steps by ``optimizer.ema_decay``. Raises UserError where the
    checkpoint has no such average.
    """
    _load(weights_state([model], saving=False), checkpoint)
    if not averaged:
        return
    decay = load_saved_config(checkpoint / CONFIG_FILE).optimizer.ema_decay
    if decay == 0:
        raise UserError(
            f"{checkpoint} has no averaged weights: it was trained with optimizer.ema_decay 0"
        )
    frozen = load_saved_config(checkpoint / CONFIG_FILE).frozen
    trained = {n: p for n, p in model.named_parameters() if not matches(n, frozen)}
    averages = {n: torch.empty(p.shape, dtype=torch.float32) for n, p in trained.items()}
    _load(
        {optimizer_key("ema", n): full_part(p, averages[n]) for n, p in trained.items()},
        checkpoint,
    )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(averages[name])


def _load(state: State, checkpoint: Path) -> None:
    try:
        load_state(state, checkpoint)
    except StorageError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"checkpoint {checkpoint} does not fit the model: {reason}") from None
