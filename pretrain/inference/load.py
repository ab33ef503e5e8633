"""Loading a checkpoint: its model and the tokenizer it was trained with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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
from pretrain.inference.generate import check_request, generate, listed_texts
from pretrain.inference.score import Pair, StateScorer
from pretrain.model.build import build_model
from pretrain.model.language_model import LanguageModel
from pretrain.parallel.context import current_context
from pretrain.run_directory import CONFIG_FILE, find_checkpoint, run_of_checkpoint


@dataclass
class LoadedModel:
    """A trained model in evaluation mode, and all that belongs to it."""

    model: LanguageModel
    tokenizer: Tokenizer
    run: RunConfig
    """The settings that it was trained with."""
    state: CheckpointState
    """The state that its checkpoint records, such as the step."""
    checkpoint: Path
    """The folder that it came from."""

    @property
    def evals_directory(self) -> Path:
        """Return where results about this run belong, ``runs/NAME/evals``."""
        return run_of_checkpoint(self.checkpoint).evals

    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int = 100,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> str:
        """Return ``prompt`` and up to ``max_tokens`` tokens after it, up to the document's end.

        temperature: 0 takes the likeliest token. top_k, top_p: see
        :func:`pretrain.inference.generate.choose`. seed: of what is drawn. Raises UserError for a
        setting out of its range.
        """
        check_request(prompt, max_tokens, temperature, top_k, top_p, seed)
        opened = [self.tokenizer.eod_id, *self.tokenizer.encode(prompt)]
        written = generate(
            self.model,
            opened,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            vocab_size=self.tokenizer.vocab_size,
            stop_id=self.tokenizer.eod_id,
            top_k=top_k,
            top_p=top_p,
        )
        return self.tokenizer.decode([*opened[1:], *written])

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the log-likelihood of each text as the beginning of a document, in nats.

        That of an empty text is 0. Raises UserError where ``texts`` is no list of strings.
        """
        scorer = StateScorer(self.model, self.tokenizer.vocab_size)
        encoded = [self.tokenizer.encode(text) for text in listed_texts(texts)]
        pairs = [Pair([self.tokenizer.eod_id], ids) for ids in encoded if ids]
        values = iter(scorer.log_likelihoods(pairs) if pairs else ())
        return [next(values)[0] if ids else 0.0 for ids in encoded]


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    recurrences: int | None = None,
    averaged: bool = False,
    device: torch.device | None = None,
) -> LoadedModel:
    """Load a checkpoint, or the latest of a run directory; no process group is needed.

    recurrences: passes through the loop of a recursive model instead of the configured number.
    averaged: weights averaged over steps (optimizer.ema_decay). device: that of this process, a GPU
    where there is one, unless given. Raises UserError naming what is wrong.
    """
    checkpoint = find_checkpoint(Path(path)).resolve()
    check_files(checkpoint)
    state = read_state(checkpoint)
    run = load_saved_config(checkpoint / CONFIG_FILE)
    tokenizer = Tokenizer.load(checkpoint)
    context = current_context(dtype)
    if device is not None:
        context = dataclasses.replace(context, home=device)
    model = build_model(state.model_config, state.vocab_size, seed=0, context=context)
    if recurrences is not None:
        if model.recursion is None:
            raise UserError(
                f"recurrences is {recurrences}, but the model of {checkpoint} has no loop"
            )
        model.recursion.set_times(recurrences)
    load_weights(checkpoint, model, averaged=averaged)
    return LoadedModel(model.eval(), tokenizer, run, state, checkpoint)
