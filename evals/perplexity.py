"""Perplexity and bits per byte of held-out documents, by sliding windows.

Every document is scored alone. It begins with the end-of-document token, as in training (the BOS
rule; an imported model has a BOS or EOS of its own), and its own end-of-document token is the last
target. Windows of ``window`` tokens advance by ``stride``; each target is scored once, with at
least ``window - stride`` tokens of context where the document has them. Windows are packed without
padding, so no state ever sees a padding token.
With ``carry_state`` windows do not overlap and the mixers' states are carried from one to the next:
every target has the full document before it (attention then looks back beyond its training length).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.common.errors import UserError
from pretrain.data.batches import open_shard
from pretrain.data.manifest import Manifest
from pretrain.data.sequences import Sequences
from pretrain.inference.load import LoadedModel
from pretrain.model.language_model import LanguageModel


@dataclass
class Window:
    """A window of ``[n]`` input and target ids, of which the last ``scored`` targets count."""

    inputs: np.ndarray
    targets: np.ndarray
    scored: int


def windows(document: np.ndarray, eod_id: int, window: int, stride: int) -> Iterator[Window]:
    """Yield the windows over ``document`` [tokens], ids that end with the end-of-document id."""
    inputs = np.concatenate([[eod_id], document[:-1]])
    done = 0
    while done < len(document):
        end = min(len(document), window if done == 0 else done + stride)
        start = max(0, end - window)
        yield Window(inputs[start:end], document[start:end], end - done)
        done = end


@torch.no_grad()
def score(model: LanguageModel, batch: list[Window]) -> list[np.ndarray]:
    """Return the negative log-likelihoods in nats of each window's scored targets, in float64."""
    device = next(model.parameters()).device
    lengths = [len(w.inputs) for w in batch]
    inputs = torch.from_numpy(np.concatenate([w.inputs for w in batch])[None]).to(device)
    targets = torch.from_numpy(np.concatenate([w.targets for w in batch])[None]).to(device)
    packed = Sequences.from_lengths(lengths, device)
    losses = model(inputs, targets, sequences=packed)[0].double().cpu().numpy()
    parts = np.split(losses, np.cumsum(lengths)[:-1])
    return [part[-w.scored :] for part, w in zip(parts, batch, strict=True)]


def evaluate_perplexity(
    loaded: LoadedModel,
    *,
    data: str | None = None,
    window: int | None = None,
    stride: int | None = None,
    carry_state: bool = False,
    max_tokens: int | None = None,
    tokens_per_pass: int = 8192,
) -> dict[str, Any]:
    """Score the validation split of a prepared directory (the run's own by default).

    ``window`` defaults to the training length, ``stride`` to half of it. ``max_tokens``, divided
    evenly over the run's directories, stops after the document in which it is reached. Returns the
    scores and every setting that they depend on. Raises UserError for settings that do not fit
    together or data of another tokenizer.
    """
    window = window or loaded.run.train.seq_len
    if carry_state and stride is not None:
        raise UserError("--stride is for overlapping windows; with --carry-state none overlap")
    stride = window if carry_state else stride or max(window // 2, 1)
    if not 1 <= stride <= window:
        raise UserError(f"stride is {stride}, expected 1 to the window of {window}")
    directories = data_directories(loaded, data)
    bytes_per_token = loaded.tokenizer.bytes_per_token()
    totals = Totals()
    entropies = {}
    budget = None if max_tokens is None else max_tokens / len(directories)
    for directory in directories:
        before = totals.tokens
        manifest = Manifest.load(directory)
        if manifest.tokenizer.sha256 != loaded.tokenizer.sha256:
            raise UserError(
                f"{directory} was made with another tokenizer ({manifest.tokenizer.sha256[:12]}...)"
                f" than the model's ({loaded.tokenizer.sha256[:12]}...); prepare it with "
                f"tokenizer: {{path: {loaded.checkpoint}}}"
            )
        entropies[directory] = asdict(manifest.byte_entropy)
        waiting: list[Window] = []
        for document in validation_documents(Path(directory), manifest):
            if budget is not None and totals.tokens - before >= budget:
                break
            totals.count_document(document, bytes_per_token)
            if carry_state:
                totals.nats += _score_with_state(loaded, document, window)
                continue
            waiting += windows(document, loaded.opening_id, window, stride)
            while sum(len(w.inputs) for w in waiting) >= tokens_per_pass:
                waiting = _score_some(loaded.model, waiting, totals, tokens_per_pass)
        while waiting:
            waiting = _score_some(loaded.model, waiting, totals, tokens_per_pass)
    if totals.bytes == 0:
        raise UserError(f"{', '.join(directories)}: no validation documents to score")
    return {
        "task": "perplexity",
        "bits_per_byte": totals.nats / math.log(2) / totals.bytes,
        "nats_per_token": totals.nats / totals.tokens,
        "perplexity": math.exp(totals.nats / totals.tokens),
        "documents": totals.documents,
        "tokens": totals.tokens,
        "bytes": totals.bytes,
        "window": window,
        "stride": None if carry_state else stride,
        "carry_state": carry_state,
        "max_tokens": max_tokens,
        "precision": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        "bos_rule": f"each document is opened by {loaded.opening}; its own end is scored",
        "tokenizer_sha256": loaded.tokenizer.sha256,
        "data": directories,
        "byte_entropy": entropies,
        "checkpoint": str(loaded.checkpoint),
        "step": loaded.state.step,
        "tokens_trained": loaded.state.tokens,
    }


def data_directories(loaded: LoadedModel, data: str | None) -> list[str]:
    """Return ``data``, or the prepared directories that a run was trained on.

    Raises UserError where there are none, as for an imported model.
    """
    blend = [source.path for source in loaded.run.data.blend]
    found = [d for d in ([data] if data else [loaded.run.data.path, *blend]) if d is not None]
    if not found:
        raise UserError(
            f"{loaded.checkpoint} has no training data: give --data, a directory prepared with its "
            "tokenizer"
        )
    return found


@torch.no_grad()
def _score_with_state(loaded: LoadedModel, document: np.ndarray, window: int) -> float:
    """Return a document's negative log-likelihood, carrying the state from window to window."""
    model, total, states = loaded.model, 0.0, None
    device = next(model.parameters()).device
    ids = torch.from_numpy(np.concatenate([[loaded.opening_id], document])).to(device)
    for start in range(0, len(document), window):
        end = min(start + window, len(document))
        x, states = model.hidden_with_state(ids[None, start:end], states)
        total -= float(model.score(x, ids[start + 1 : end + 1])[0].double().sum())
    return total


@dataclass
class Totals:
    """Running totals of what has been scored; ``tokens`` and ``bytes`` count full documents."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    documents: int = 0

    def count_document(self, document: np.ndarray, bytes_per_token: np.ndarray) -> None:
        """Count a document [tokens], by the bytes of each token of the vocabulary."""
        self.documents += 1
        self.tokens += len(document)
        self.bytes += int(bytes_per_token[document].sum())


def _score_some(
    model: LanguageModel, waiting: list[Window], totals: Totals, tokens_per_pass: int
) -> list[Window]:
    """Score the first windows that fit into one pass, and return the others."""
    size = count = 0
    for w in waiting:
        size += len(w.inputs)
        if count and size > tokens_per_pass:
            break
        count += 1
    totals.nats += sum(float(part.sum()) for part in score(model, waiting[:count]))
    return waiting[count:]


def validation_documents(directory: Path, manifest: Manifest) -> Iterator[np.ndarray]:
    """Yield the documents of a prepared directory's validation split, [tokens] ids in int64."""
    manifest.verify_sizes(directory)
    for shard in manifest.shards:
        if shard.split == "valid":
            dataset = open_shard(directory / shard.name)
            for index in range(len(dataset)):
                yield dataset[index].astype(np.int64)
