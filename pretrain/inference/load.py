"""From a checkpoint to a model and the tokenizer it was trained with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain.checkpoint.state import (
    CheckpointState,
    check_files,
    load_weights,
    read_state,
)
from pretrain.common.errors import UserError
from pretrain.config import RunConfig, load_saved_config
from pretrain.data.tokenizer import Tokenizer
from pretrain.model.build import build_model
from pretrain.model.language_model import LanguageModel
from pretrain.parallel.processes import start_processes
from pretrain.run_directory import CONFIG_FILE, find_checkpoint, run_of_checkpoint


@dataclass
class LoadedModel:
    """run: the settings it was trained with; checkpoint: the folder it came from."""

    model: LanguageModel
    tokenizer: Tokenizer
    run: RunConfig
    state: CheckpointState
    checkpoint: Path

    @property
    def evals_directory(self) -> Path:
        """Where this run's results belong: ``runs/NAME/evals``."""
        return run_of_checkpoint(self.checkpoint).evals


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    recurrences: int | None = None,
    averaged: bool = False,
) -> LoadedModel:
    """A checkpoint, or the latest of a run directory; ``recurrences``: passes through the loop of
    a recursive model instead of the configured number; ``averaged``: weights averaged over steps
    (optimizer.ema_decay). Raises UserError naming what is wrong."""
    checkpoint = find_checkpoint(Path(path)).resolve()
    check_files(checkpoint)
    state = read_state(checkpoint)
    run = load_saved_config(checkpoint / CONFIG_FILE)
    tokenizer = Tokenizer.load(checkpoint)
    start_processes()
    model = build_model(state.model_config, state.vocab_size, seed=0, dtype=dtype)
    if recurrences is not None:
        if model.recursion is None:
            raise UserError(f"--recurrences is given, but the model of {checkpoint} has no loop")
        model.recursion.set_times(recurrences)
    load_weights(checkpoint, model, averaged=averaged)
    return LoadedModel(model.eval(), tokenizer, run, state, checkpoint)
