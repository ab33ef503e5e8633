"""Averages of the weights of checkpoints, whatever layout of processes wrote them.

A checkpoint holds whole tensors, in parts; one tensor of each is read at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pretrain.checkpoint.sharded_state import StorageError, full_part, optimizer_key
from pretrain.checkpoint.state import CheckpointState, check_files, check_same_model, read_state
from pretrain.checkpoint.storage import load_state
from pretrain.common.errors import UserError


def check_mergeable(checkpoints: Sequence[Path]) -> list[CheckpointState]:
    """Return the states of checkpoints; raise UserError unless they are whole and of one model."""
    states = []
    for checkpoint in checkpoints:
        check_files(checkpoint)
        states.append(read_state(checkpoint))
        check_same_model(states[-1], states[0].model_config, states[0].vocab_size, checkpoint)
        if states[-1].tokenizer_sha256 != states[0].tokenizer_sha256:
            raise UserError(
                f"{checkpoint} was trained with another tokenizer than {checkpoints[0]}; expected "
                "checkpoints of one run"
            )
    return states


@torch.no_grad()
def average_into(model: nn.Module, checkpoints: Sequence[Path], weights: Sequence[float]) -> None:
    """Fill ``model``, on one process, with the weighted sum of the checkpoints' weights.

    Sums are in float64, a tensor at a time. Of weights in low precision it is the float32 copies
    that the optimizer updates. Raises UserError where a checkpoint lacks a tensor.
    """
    copies = [read_state(path).precision != "float32" for path in checkpoints]
    for name, parameter in model.named_parameters():
        total = torch.zeros(parameter.shape, dtype=torch.float64)
        for checkpoint, weight, copied in zip(checkpoints, weights, copies, strict=True):
            found = _read(checkpoint, name, parameter, copied=copied)
            total.add_(found.double(), alpha=float(weight))
        parameter.copy_(total)


def _read(checkpoint: Path, name: str, parameter: nn.Parameter, *, copied: bool) -> Tensor:
    """Return a tensor of a checkpoint: with ``copied`` its float32 copy, if it has one.

    A merge has none, nor has a weight that is not trained.
    """
    found = torch.empty(parameter.shape, dtype=torch.float32)
    part = full_part(parameter, found)
    if copied:
        with contextlib.suppress(StorageError):
            load_state({optimizer_key("param", name): part}, checkpoint)
            return found
    try:
        load_state({name: part}, checkpoint)
    except StorageError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"checkpoint {checkpoint} does not fit the model: {reason}") from None
    return found
