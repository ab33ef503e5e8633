"""Loading a checkpoint: its model and the tokenizer it was trained with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from pretrain.inference.exiting import ExitingModel
from pretrain.inference.exits import ExitRule
from pretrain.inference.generate import check_request, generate, listed_texts
from pretrain.inference.hugging_face import HuggingFaceText
from pretrain.inference.score import Pair, StateScorer
from pretrain.inference.speculate import Speculation, speculate
from pretrain.inference.wavefront import Draw, WavefrontReport, wavefront_ids
from pretrain.inference.wavefront_rules import Wavefront
from pretrain.model.build import build_model
from pretrain.model.language_model import LanguageModel
from pretrain.parallel.context import current_context
from pretrain.run_directory import CONFIG_FILE, find_checkpoint, run_of_checkpoint

IMPORTED = "transformers"  # the folder of an imported checkpoint with its own tokenizer's settings


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
    imported: HuggingFaceText | None = None
    """How an imported model reads and ends texts; None for a model that was trained here."""
    exits: ExitingModel | None = None
    """The model with tokens that leave its loop by themselves, where that was asked for."""

    @property
    def reader(self) -> LanguageModel | ExitingModel:
        """Return what texts are scored and generated with."""
        return self.model if self.exits is None else self.exits

    @property
    def evals_directory(self) -> Path:
        """Return where results about this run belong, ``runs/NAME/evals``."""
        return run_of_checkpoint(self.checkpoint).evals

    @property
    def opening_id(self) -> int:
        """Return the token before a text's first: that of a document's end, or an import's own."""
        return self.tokenizer.eod_id if self.imported is None else self.imported.prefix_id

    @property
    def opening(self) -> str:
        """Return the name of :attr:`opening_id` in results."""
        own = self.imported is not None
        return "the imported model's BOS or EOS" if own else "the end-of-document token"

    @property
    def stop_ids(self) -> frozenset[int]:
        """Return the ids that end a generated text."""
        ends = frozenset({self.tokenizer.eod_id})
        return ends if self.imported is None else self.imported.stop_ids

    @property
    def candidates(self) -> int:
        """Return how many ids can follow: the tokenizer's, of an import all that it has rows for.

        transformers' probabilities count its rows that no token has.
        """
        return self.tokenizer.vocab_size if self.imported is None else self.model.vocab_size

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the ids of a text to continue, opened as the model knows texts."""
        if self.imported is not None:
            return self.imported.prompt(prompt)
        return [self.tokenizer.eod_id, *self.tokenizer.encode(prompt)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` without what opens and ends it."""
        return self.tokenizer.decode(ids) if self.imported is None else self.imported.decode(ids)

    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int = 100,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        speculate: str | None = None,
        parallel: Wavefront | None = None,
        report: WavefrontReport | None = None,
    ) -> str:
        """Return ``prompt`` and up to ``max_tokens`` tokens after it, up to the document's end.

        temperature: 0 takes the likeliest token. top_k, top_p: see
        :func:`pretrain.inference.generate.choose`. seed: of what is drawn. speculate: ``"4:1"``
        drafts 4 tokens with 1 pass of a recursive model's loop, for the same greedy text. parallel:
        several tokens at once, by recurrent depth, of which ``report`` takes the figures. Raises
        UserError for a setting out of its range, and for a model that cannot.
        """
        check_request(prompt, max_tokens, temperature, top_k, top_p, seed)
        opened = self.prompt_ids(prompt)
        drawn: dict[str, Any] = {
            "vocab_size": self.candidates,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
        }
        ends: dict[str, Any] = {"max_tokens": max_tokens, "stop_ids": self.stop_ids}
        written: Iterable[int]
        if parallel is not None:
            self._check_alone(parallel, speculate)
            written = wavefront_ids(
                self.model, opened, parallel, Draw(**drawn), **ends, report=report
            )
        elif speculate is not None:
            how = Speculation.parse(speculate)
            written = self._speculate(opened, max_tokens, temperature, how)
        else:
            written = generate(self.reader, opened, **drawn, **ends)
        return prompt + self.decode([*opened, *written])[len(self.decode(opened)) :]

    def _check_alone(self, parallel: Wavefront, speculate: str | None) -> None:
        """Raise UserError where several tokens at once shall also be drafts, or leave early."""
        if speculate is not None:
            raise UserError(
                f"parallel is given, but speculate is {speculate}; expected one of them"
            )
        if self.exits is not None:
            raise UserError(f"parallel is given, but tokens have exits: {self.exits.rule}")

    def _speculate(
        self, opened: list[int], max_tokens: int, temperature: float, how: Speculation
    ) -> list[int]:
        if temperature > 0:
            raise UserError(
                f"speculate is {how}, which is greedy, but temperature is {temperature}"
            )
        if self.exits is not None:
            raise UserError(f"speculate is {how}, but tokens have exits: {self.exits.rule}")
        written = speculate(
            self.model,
            opened,
            how,
            max_tokens=max_tokens,
            vocab_size=self.candidates,
            stop_ids=self.stop_ids,
        )
        return list(written)

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the log-likelihood of each text in nats, given the token that opens texts.

        That of an empty text is 0. Raises UserError where ``texts`` is no list of strings.
        """
        scorer = StateScorer(self.reader, self.candidates)
        if self.imported is None:
            encoded = [self.tokenizer.encode(text) for text in listed_texts(texts)]
        else:
            encoded = [self.imported.opened(text)[1:] for text in listed_texts(texts)]
        pairs = [Pair([self.opening_id], ids) for ids in encoded if ids]
        values = iter(scorer.log_likelihoods(pairs) if pairs else ())
        return [next(values)[0] if ids else 0.0 for ids in encoded]


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    recurrences: int | None = None,
    averaged: bool = False,
    exits: ExitRule | str | None = None,
    device: torch.device | None = None,
) -> LoadedModel:
    """Load a checkpoint, or the latest of a run directory; no process group is needed.

    recurrences: passes through the loop of a recursive model instead of the configured number.
    averaged: weights averaged over steps (optimizer.ema_decay). exits: when a token leaves that
    loop, such as ``"kl:1e-3"``; what tokens use is ``.exits.summary()`` then. device: that of this
    process, a GPU where there is one, unless given. Raises UserError naming what is wrong.
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
    folder = checkpoint / IMPORTED
    imported = HuggingFaceText.load(folder) if folder.is_dir() else None
    loaded = LoadedModel(model.eval(), tokenizer, run, state, checkpoint, imported)
    if exits is not None:
        rule = ExitRule.parse(exits) if isinstance(exits, str) else exits
        loaded.exits = ExitingModel(model, rule, loaded.candidates)
    return loaded
