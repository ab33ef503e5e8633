"""Loss by position far beyond the training length, and the size of the recurrent states there.

Held-out documents, each beginning with the end-of-document token as in training and drawn at random
from all sources, are read as one text without resets between them, in sequences of up to 16 times
the training length. A model that extrapolates keeps its loss; one whose state fills up or grows
loses it beyond some position, and its state's size shows why (state collapse, arXiv 2410.07145).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from evals.held_out import data_directories, running_text
from pretrain.common.errors import UserError
from pretrain.common.files import write_figure
from pretrain.common.plots import plot_text
from pretrain.inference.load import LoadedModel
from pretrain.model.spec import block_specs
from pretrain.nn.mixers.base import State
from pretrain.nn.mixers.mitigations import held


@torch.no_grad()
def evaluate_positions(
    loaded: LoadedModel, *, data: str | None = None, factor: int = 16, sequences: int = 8
) -> dict[str, Any]:
    """Measure the mean loss in bins of positions, and the recurrent states where the bins end.

    Scores ``sequences`` of ``factor`` x the training length, fewer where the validation text is
    shorter. Returns the loss in nats per token by bin and the root mean square of each recurrent
    block's state. Raises UserError where the text is shorter than one sequence, or was made with
    another tokenizer.
    """
    seq_len = loaded.run.train.seq_len
    length = factor * seq_len
    directories = data_directories(loaded, data)
    text = running_text(loaded, data, sequences * length + 1)
    count = (len(text) - 1) // length
    if count == 0:
        raise UserError(
            f"{', '.join(directories)}: {len(text):,} tokens of validation text are fewer than one "
            f"sequence of {factor} x {seq_len}; use more text or a smaller --factor"
        )
    ends = _bin_ends(seq_len, length)
    losses = np.zeros(length)
    sizes: dict[str, np.ndarray] = {}
    for start in range(0, count * length, length):
        nats, states = _score_sequence(loaded, text[start : start + length + 1], ends)
        losses += nats / count
        for name, values in states.items():
            sizes[name] = sizes.get(name, np.zeros(len(ends))) + np.array(values) / count
    begins = [0, *ends[:-1]]
    inside, beyond = losses[seq_len // 2 : seq_len], losses[seq_len:]
    return {
        "task": "positions",
        "seq_len": seq_len,
        "factor": factor,
        "sequences": count,
        "bins": [
            {"from": a, "to": b, "nats_per_token": float(losses[a:b].mean())}
            for a, b in zip(begins, ends, strict=True)
        ],
        # None where --factor 1 reads nothing beyond it.
        "beyond_training_length": float(beyond.mean() - inside.mean()) if len(beyond) else None,
        "state_rms": {name: values.tolist() for name, values in sizes.items()},
        "positions_of_state_rms": ends,
        "data": directories,
        "tokenizer_sha256": loaded.tokenizer.sha256,
        "checkpoint": str(loaded.checkpoint),
        "step": loaded.state.step,
        "tokens_trained": loaded.state.tokens,
        "precision": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
    }


def _bin_ends(seq_len: int, length: int) -> list[int]:
    """Return the positions where bins end and states are measured.

    These are the training length times powers of 2 and 1.5 times those, from a quarter on.
    """
    ends = {length}
    for power in range(-2, math.ceil(math.log2(length / seq_len)) + 1):
        for part in (1.0, 1.5):
            ends.add(round(seq_len * 2.0**power * part))
    return sorted(e for e in ends if 0 < e <= length)


def _score_sequence(
    loaded: LoadedModel, tokens: np.ndarray, ends: list[int]
) -> tuple[np.ndarray, dict[str, list[float]]]:
    """Return the loss at every position, and each state's size at every one of ``ends``.

    Runs bin by bin, carrying the state.
    """
    model = loaded.model
    device = next(model.parameters()).device
    ids = torch.from_numpy(tokens[None]).to(device)
    names = _block_names(loaded)
    states: list[State] | None = None
    losses, sizes, before = [], dict[str, list[float]](), list[int]()
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        logits, states = model.forward_with_state(ids[:, begin:end], states)
        flat = torch.nn.functional.cross_entropy(
            logits[0].float(), ids[0, begin + 1 : end + 1], reduction="none"
        )
        losses.append(flat.double().cpu().numpy())
        shown = [held(state) for state in states]
        numbers = [sum(t.numel() for t in state.values()) for state in shown]
        for i, state in enumerate(shown):
            # A state that grows with the text is a cache.
            if state and (not before or numbers[i] == before[i]):
                sizes.setdefault(names[i], []).append(_rms(state))
            else:
                sizes.pop(names[i], None)
        before = numbers
    return np.concatenate(losses), {n: v for n, v in sizes.items() if len(v) == len(ends)}


def _rms(state: State) -> float:
    values: list[Tensor] = [t.float() for t in state.values() if t.is_floating_point()]
    total = sum(float((t * t).sum()) for t in values)
    return math.sqrt(total / max(sum(t.numel() for t in values), 1))


def _block_names(loaded: LoadedModel) -> list[str]:
    """Return a name for every state: the block's number and mixer, and the pass of a loop."""
    specs, recursion = block_specs(loaded.run.model), loaded.model.recursion
    plain = [f"{i} {spec.name}" for i, spec in enumerate(specs)]
    if recursion is None:
        return plain
    first, last = recursion.config.prelude, len(specs) - recursion.config.coda
    looped = [
        f"{n}, pass {t + 1}"
        for t in range(recursion.times or recursion.config.times)
        for n in plain[first:last]
    ]
    return [*plain[:first], *looped, *plain[last:]]


def draw_positions(result: dict[str, Any], path: Path) -> Path:
    """Draw the loss by position, and below it the states' sizes relative to the training length."""
    recurrent = bool(result["state_rms"])
    figure = Figure(figsize=(8, 7 if recurrent else 4), layout="constrained")
    grid: Any = figure.subplots(2 if recurrent else 1, 1, sharex=True)
    axes = np.atleast_1d(grid)
    middles = [math.sqrt(max(b["from"], 1) * b["to"]) for b in result["bins"]]
    axes[0].plot(middles, [b["nats_per_token"] for b in result["bins"]], "o-")
    axes[0].set(
        xscale="log", ylabel="loss (nats per token)", title=f"{result['sequences']} sequences"
    )
    if recurrent:
        ends = result["positions_of_state_rms"]
        at = ends.index(result["seq_len"])
        for name, values in result["state_rms"].items():
            axes[1].plot(
                ends, np.array(values) / max(values[at], 1e-30), label=plot_text(name), linewidth=1
            )
        axes[1].set(yscale="log", ylabel="state's root mean square,\n1 at the training length")
        axes[1].legend(fontsize=7)
    for one in axes:
        one.axvline(result["seq_len"], color="gray", linestyle="--", linewidth=1)
        one.grid(alpha=0.3)
    axes[-1].set(xlabel="position (dashed: training length)")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_figure(path, figure, dpi=130)
    return path
