"""Perplexity and bits per byte of held-out text, in all and by source.

By default every document is scored alone, by sliding windows (see :mod:`evals.held_out`); with
``max_tokens`` a random sample of these windows. Windows are packed without padding, so no state
ever sees a padding token. With ``carry_state`` windows do not overlap and the mixers' states are
carried from one to the next: every target has the full document before it (attention then looks
back beyond its training length). With ``training_windows`` it is the windows that validation in
training scores, which are cut from the stream of documents wherever they fall: the same loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from evals.held_out import (
    TRAINING_WINDOWS,
    Documents,
    Scores,
    Window,
    bits_per_byte,
    data_directories,
    nats_per_token,
    open_held_out,
    sample,
)
from pretrain.common.errors import UserError
from pretrain.data.batches import PreparedData
from pretrain.data.manifest import Manifest
from pretrain.data.sequences import Sequences
from pretrain.data.validation import validation_batches
from pretrain.inference.exiting import ExitingModel
from pretrain.inference.load import LoadedModel
from pretrain.model.language_model import LanguageModel


@torch.no_grad()
def score(model: LanguageModel | ExitingModel, batch: list[Window]) -> list[np.ndarray]:
    """Return the negative log-likelihoods in nats of each window's scored targets, in float64.

    With exits, what those tokens used is added to what the model has.
    """
    device = next(model.parameters()).device
    lengths = [len(w.inputs) for w in batch]
    inputs = torch.from_numpy(np.concatenate([w.inputs for w in batch])[None]).to(device)
    targets = torch.from_numpy(np.concatenate([w.targets for w in batch])[None]).to(device)
    packed = Sequences.from_lengths(lengths, device)
    if isinstance(model, ExitingModel):
        reading = model.read(inputs, None, sequences=packed)
        found = -model.score(reading.rows, targets[0])[0]
        counts = [np.arange(len(w.inputs)) >= len(w.inputs) - w.scored for w in batch]
        model.used.append(reading.used.take(np.concatenate(counts)))
    else:
        found = model(inputs, targets, sequences=packed)[0]
    losses = found.double().cpu().numpy()
    parts = np.split(losses, np.cumsum(lengths)[:-1])
    return [part[-w.scored :] for part, w in zip(parts, batch, strict=True)]


def evaluate_perplexity(
    loaded: LoadedModel,
    *,
    data: str | None = None,
    window: int | None = None,
    stride: int | None = None,
    carry_state: bool = False,
    training_windows: bool = False,
    max_tokens: int | None = None,
    seed: int | None = None,
    tokens_per_pass: int = 8192,
) -> dict[str, Any]:
    """Score the validation split of a prepared directory (the run's own by default).

    ``window`` defaults to the training length, ``stride`` to half of it. ``max_tokens`` scores a
    random sample of the windows (with ``carry_state``, of the documents) of about so many tokens,
    drawn by ``seed`` (0), every source in its share of the text; the standard errors are those of
    drawing it. Returns the scores, those of each source, and every setting that they depend on.
    Raises UserError for settings that do not fit together or data of another tokenizer.
    """
    if training_windows:
        exits = None if loaded.exits is None else str(loaded.exits.rule)
        _only_training_windows(window, stride, carry_state, max_tokens, exits)
    if seed is not None and max_tokens is None:
        raise UserError(f"--seed is {seed}, but only --max-tokens draws a sample; give both")
    window = window or loaded.run.train.seq_len
    if carry_state and stride is not None:
        raise UserError("--stride is for overlapping windows; with --carry-state none overlap")
    whole = carry_state or training_windows
    stride = window if whole else stride or max(window // 2, 1)
    if not 1 <= stride <= window:
        raise UserError(f"stride is {stride}, expected 1 to the window of {window}")
    directories = data_directories(loaded, data)
    held_out = open_held_out(loaded, data, training_windows=training_windows)
    if training_windows:
        found = _score_training_windows(loaded, held_out)
    else:
        found = _score_documents(
            loaded, held_out, window, stride, carry_state, max_tokens, seed or 0, tokens_per_pass
        )
    if sum(scores.bytes for scores in found) == 0:
        raise UserError(f"{', '.join(directories)}: no validation documents to score")
    total = _summary(found)
    weights = sum(scores.weight for scores in found)
    by_source = [
        {"source": scores.source, "weight": scores.weight / weights, **_summary([scores])}
        for scores in found
    ]
    return {
        "task": "perplexity",
        **total,
        **({} if loaded.exits is None else {"depth": loaded.exits.take_summary()}),
        "perplexity": float(torch.tensor(total["nats_per_token"], dtype=torch.float64).exp()),
        # As if every source had as much text as training takes of it.
        "nats_per_token_by_training_weights": sum(
            s["weight"] * s["nats_per_token"] for s in by_source
        ),
        "sources": by_source,
        "windows": TRAINING_WINDOWS if training_windows else "of documents",
        "window": window,
        "stride": None if carry_state else stride,
        "carry_state": carry_state,
        "max_tokens": max_tokens,
        "seed": None if max_tokens is None else seed or 0,
        "precision": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        "bos_rule": f"each document is opened by {loaded.opening}; its own end is scored",
        "tokenizer_sha256": loaded.tokenizer.sha256,
        "data": directories,
        "byte_entropy": {d: asdict(Manifest.load(d).byte_entropy) for d in directories},
        "checkpoint": str(loaded.checkpoint),
        "step": loaded.state.step,
        "tokens_trained": loaded.state.tokens,
    }


def _only_training_windows(*others: int | bool | str | None) -> None:
    names = ("--window", "--stride", "--carry-state", "--max-tokens", "--exit")
    given = [name for name, value in zip(names, others, strict=True) if value]
    if given:
        raise UserError(
            f"{given[0]} does not go with --training-windows, whose windows are those of "
            "validation in training; leave one of them out"
        )


def _summary(found: list[Scores]) -> dict[str, Any]:
    nats, nats_error = nats_per_token(found)
    # A sample may hold nothing but ends of documents, which stand for no bytes.
    known = any(scores.bytes for scores in found)
    bits, bits_error = bits_per_byte(found) if known else (None, None)
    return {
        "bits_per_byte": bits,
        "nats_per_token": nats,
        "stderr": {"bits_per_byte": bits_error, "nats_per_token": nats_error},
        "documents": sum(scores.documents for scores in found),
        "tokens": sum(scores.tokens for scores in found),
        "bytes": sum(scores.bytes for scores in found),
    }


def _score_documents(
    loaded: LoadedModel,
    held_out: PreparedData,
    window: int,
    stride: int,
    carry_state: bool,
    max_tokens: int | None,
    seed: int,
    tokens_per_pass: int,
) -> list[Scores]:
    """Return what was scored of each source that has validation text: windows, or documents."""
    sizes = loaded.tokenizer.bytes_per_token()
    sources = [
        (label, weight, Documents(stream, loaded.opening_id, window, stride))
        for label, weight, stream in zip(
            held_out.labels, held_out.weights, held_out.valid, strict=True
        )
        if len(stream)
    ]
    counts = [len(d.lengths) if carry_state else d.num_windows for _, _, d in sources]
    every = [(n, d.num_tokens) for n, (_, _, d) in zip(counts, sources, strict=True)]
    found = []
    for (label, weight, documents), numbers, available in zip(
        sources, sample(every, max_tokens, seed), counts, strict=True
    ):
        if carry_state:
            texts = (documents.document(i) for i in numbers)
            parts = [
                (_score_with_state(loaded, text, window), len(text), int(sizes[text].sum()))
                for text in texts
            ]
            seen = len(numbers)
        else:
            windows = (documents.window(i) for i in numbers)
            parts = _score_windows(loaded.reader, windows, sizes, tokens_per_pass)
            seen = len({documents.document_of(i) for i in numbers})
        found.append(Scores(label, weight, np.array(parts, np.float64), available, seen))
    return found


def _score_windows(
    model: LanguageModel | ExitingModel,
    windows: Iterable[Window],
    sizes: np.ndarray,
    tokens_per_pass: int,
) -> list[tuple[float, int, int]]:
    """Return (nats, tokens, bytes) of each window, as many in a pass as fit."""
    parts: list[tuple[float, int, int]] = []
    if isinstance(model, ExitingModel):
        tokens_per_pass = min(tokens_per_pass, model.tokens_at_once)
    for batch in in_passes(windows, tokens_per_pass):
        for w, nats in zip(batch, score(model, batch), strict=True):
            text_bytes = int(sizes[w.targets[-w.scored :]].sum())
            parts.append((float(nats.sum()), w.scored, text_bytes))
    return parts


def in_passes(windows: Iterable[Window], tokens_per_pass: int) -> Iterator[list[Window]]:
    """Yield neighbours of so many tokens at most; a longer window is alone."""
    waiting: list[Window] = []
    size = 0
    for w in windows:
        size += len(w.inputs)
        if waiting and size > tokens_per_pass:
            yield waiting
            waiting, size = [], len(w.inputs)
        waiting.append(w)
    if waiting:
        yield waiting


@torch.no_grad()
def _score_with_state(loaded: LoadedModel, document: np.ndarray, window: int) -> float:
    """Return a document's negative log-likelihood, carrying the state from window to window."""
    model, total, states = loaded.reader, 0.0, None
    device = next(model.parameters()).device
    ids = torch.from_numpy(np.concatenate([[loaded.opening_id], document])).to(device)
    for start in range(0, len(document), window):
        end = min(start + window, len(document))
        x, states = model.hidden_with_state(ids[None, start:end], states)
        total -= float(model.score(x, ids[start + 1 : end + 1])[0].double().sum())
    return total


@torch.no_grad()
def _score_training_windows(loaded: LoadedModel, held_out: PreparedData) -> list[Scores]:
    """Return what was scored of each source, of the windows that validation in training scores."""
    run, model = loaded.run, loaded.model
    sizes = torch.from_numpy(loaded.tokenizer.bytes_per_token())
    device = next(model.parameters()).device
    batches = validation_batches(
        held_out,
        run.train,
        run.parallel.micro_batch_size,
        run.validation.tokens,
        run.data.prefix,
    )
    found = []
    for label, weight in zip(held_out.labels, held_out.weights, strict=True):
        parts, documents = [], 0
        for batch in batches.get(label, []):
            on_device = batch.to(device)
            losses = model(on_device.tokens, on_device.targets, sequences=on_device.sequences)
            counted = batch.loss_mask > 0
            targets = batch.targets[counted]
            nats = losses.double()[counted.to(device)].sum()
            parts.append((float(nats), targets.numel(), int(sizes[targets].sum())))
            documents += batch.sequences.count
        if parts:
            found.append(Scores(label, weight, np.array(parts, np.float64), len(parts), documents))
    return found
