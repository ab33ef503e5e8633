"""``python -m evals exits RUN --exit kl:1e-2 --exit kl:1e-3``: what thresholds of exits cost.

Bits per byte of held-out text against mean passes and FLOPs, next to as many passes for every
token; and the exit in hindsight, the first pass whose likeliest token is the last pass's, which no
rule that changes no greedy token can go below.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from evals.exit_options import add_options, exit_rule, given_exits
from evals.held_out import Documents, Scores, Window, bits_per_byte, open_held_out, sample
from evals.perplexity import in_passes, score
from pretrain.common.argument_types import positive
from pretrain.common.errors import UserError
from pretrain.common.files import file_name, write_json
from pretrain.common.outputs import check_folder
from pretrain.common.screen import show_table, titled_table
from pretrain.data.sequences import Sequences
from pretrain.inference.depth_used import DepthUsed, flops
from pretrain.inference.exiting import ExitingModel
from pretrain.inference.exits import ExitRule
from pretrain.inference.load import LoadedModel, load_model
from pretrain.inference.passes import outputs_by_pass
from pretrain.parallel.processes import stop_processes

_TOKENS = 20_000
_PER_PASS = 4096


@dataclasses.dataclass
class _Text:
    """The windows of one source, and the bytes of their scored targets."""

    label: str
    weight: float
    windows: list[Window]
    sizes: list[int]
    chosen_on: np.ndarray  # of each window, whether thresholds are chosen on it


def main(arguments: Sequence[str]) -> int:
    """Print and write the table of a run."""
    parser = argparse.ArgumentParser(
        prog="python -m evals exits",
        description="Score exits of a recursive model's tokens, next to fixed passes.",
    )
    parser.add_argument("checkpoint", help="a run directory, or one of its checkpoints/step-N")
    add_options(parser, several=True)
    parser.add_argument("--data", help="a prepared data directory (the run's)")
    parser.add_argument("--window", type=positive, help="tokens per window (training length)")
    parser.add_argument(
        "--max-tokens",
        type=positive,
        default=_TOKENS,
        help=f"score a random sample of the windows, of about this many tokens ({_TOKENS:,})",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help="choose the exit with the fewest passes that costs at most so many bits per byte on "
        "one half of the documents; all scores are then of the other half",
    )
    given = parser.parse_args(arguments)
    options = given_exits(given)
    if not given.exit:
        raise UserError("there is no --exit, expected one or more, such as --exit kl:1e-3")
    if given.tolerance is not None and not 0 <= given.tolerance < math.inf:
        raise UserError(f"--tolerance is {given.tolerance}, expected a number from 0")
    found = [exit_rule({**options, "exit": text}) for text in dict.fromkeys(given.exit)]
    rules = [rule for rule in found if rule is not None]
    loaded = load_model(given.checkpoint)
    check_folder(loaded.evals_directory, "the folder for results")
    result = evaluate_exits(
        loaded,
        rules,
        data=given.data,
        window=given.window,
        max_tokens=given.max_tokens,
        tolerance=given.tolerance,
    )
    path = loaded.evals_directory / f"{file_name(f'exits-{loaded.checkpoint.name}')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    _show(result)
    print(f"written to {path}")
    stop_processes()
    return 0


def evaluate_exits(
    loaded: LoadedModel,
    rules: Sequence[ExitRule],
    *,
    data: str | None = None,
    window: int | None = None,
    max_tokens: int = _TOKENS,
    tolerance: float | None = None,
) -> dict[str, Any]:
    """Score ``rules``, and every fixed number of passes, on held-out text.

    With ``tolerance`` one rule is chosen on the text of every second document, and what is returned
    are the scores of the others. Raises UserError for a model without a loop that tokens can leave.
    """
    readers = [ExitingModel(loaded.model, rule, loaded.candidates) for rule in rules]
    texts = _texts(loaded, data, window or loaded.run.train.seq_len, max_tokens)
    scored = None if tolerance is None else False
    fixed, hindsight = _by_pass(loaded, texts)
    bits = [_bits(texts, nats, scored) for nats in fixed]
    rows = []
    for reader in readers:
        limit = min(_PER_PASS, reader.tokens_at_once)
        nats, depths = [], []
        for text in texts:
            found = [reader_scores(reader, w) for w in in_passes(text.windows, limit)]
            nats.append(np.array([float(n.sum()) for some, _ in found for n in some]))
            depths += [some for _, passes in found for some in passes]
        flags = np.concatenate([text.chosen_on for text in texts])
        reader.used = [
            d for d, flag in zip(depths, flags, strict=True) if scored is None or flag == scored
        ]
        depth = reader.take_summary()
        rows.append(
            {
                **dataclasses.asdict(reader.rule),
                "exit": str(reader.rule),
                "bits_per_byte": _bits(texts, nats, scored),
                "bits_per_byte_of_fixed_passes": float(
                    np.interp(depth["mean_passes"], range(1, len(bits) + 1), bits)
                ),
                "depth": depth,
                "chosen_on": None if scored is None else _bits(texts, nats, True),
            }
        )
    chosen = None
    if tolerance is not None:
        most = _bits(texts, fixed[-1], True) + tolerance
        good = [row for row in rows if row["chosen_on"] <= most]
        chosen = min(good, key=lambda r: r["depth"]["mean_passes"])["exit"] if good else None
    return {
        "task": "exits",
        "exits": rows,
        "fixed_passes": {str(n): value for n, value in enumerate(bits, 1)},
        "fixed_flops_per_token": {
            str(n): _flops(loaded, texts, n, scored) for n in range(1, len(bits) + 1)
        },
        "hindsight": hindsight,
        "tolerance": tolerance,
        "chosen": chosen,
        "tokens": sum(int(w.scored) for text in texts for w in text.windows),
        "max_tokens": max_tokens,
        "checkpoint": str(loaded.checkpoint),
        "step": loaded.state.step,
    }


def reader_scores(reader: ExitingModel, batch: list[Window]) -> tuple[list[np.ndarray], list[Any]]:
    """Return the nats of each window's scored targets, and the depth that each window used."""
    nats = score(reader, batch)
    used = reader.used.pop()
    ends = np.cumsum([w.scored for w in batch])
    parts = [used.take(np.arange(end - w.scored, end)) for w, end in zip(batch, ends, strict=True)]
    return nats, parts


def _texts(loaded: LoadedModel, data: str | None, window: int, max_tokens: int) -> list[_Text]:
    held_out, sizes = open_held_out(loaded, data), loaded.tokenizer.bytes_per_token()
    sources = [
        (label, weight, Documents(stream, loaded.opening_id, window, max(window // 2, 1)))
        for label, weight, stream in zip(
            held_out.labels, held_out.weights, held_out.valid, strict=True
        )
        if len(stream)
    ]
    if not sources:
        raise UserError(f"{loaded.checkpoint}: no validation documents to score")
    every = [(d.num_windows, d.num_tokens) for _, _, d in sources]
    found = []
    for (label, weight, documents), numbers in zip(
        sources, sample(every, max_tokens, 0), strict=True
    ):
        windows = [documents.window(n) for n in numbers]
        counts = [int(sizes[w.targets[-w.scored :]].sum()) for w in windows]
        # Of the documents that are scored, every second one.
        order = {
            d: i for i, d in enumerate(dict.fromkeys(documents.document_of(n) for n in numbers))
        }
        halves = np.array([order[documents.document_of(n)] % 2 == 0 for n in numbers])
        found.append(_Text(label, weight, windows, counts, halves))
    return found


@torch.no_grad()
def _by_pass(
    loaded: LoadedModel, texts: Iterable[_Text]
) -> tuple[list[list[np.ndarray]], dict[str, float]]:
    """Return the nats of windows, by number of passes and by text, and the exit in hindsight."""
    model, candidates = loaded.model, loaded.candidates
    device = next(model.parameters()).device
    nats: list[list[list[float]]] = []
    firsts: list[np.ndarray] = []
    for place, text in enumerate(texts):
        for batch in in_passes(text.windows, _PER_PASS):
            inputs = torch.from_numpy(np.concatenate([w.inputs for w in batch])).to(device)
            targets = torch.from_numpy(np.concatenate([w.targets for w in batch])).to(device)
            lengths = [len(w.inputs) for w in batch]
            packed, likeliest = Sequences.from_lengths(lengths, device), []
            counted = torch.cat(
                [torch.arange(len(w.inputs)) >= len(w.inputs) - w.scored for w in batch]
            )
            for number, rows in enumerate(outputs_by_pass(model, inputs[None], packed)):
                scores = model.score(rows, targets, candidates).double().cpu()
                likeliest.append(scores[1].numpy()[counted])
                if number == len(nats):
                    nats.append([[] for _ in range(place)])
                while len(nats[number]) <= place:
                    nats[number].append([])
                parts = scores[0].split(lengths)
                nats[number][place] += [
                    -float(p[-w.scored :].sum()) for p, w in zip(parts, batch, strict=True)
                ]
            agree = np.stack(likeliest) == likeliest[-1]
            firsts.append(agree.argmax(0) + 1)
    shares = np.bincount(np.concatenate(firsts)) / sum(map(len, firsts))
    hindsight = {str(n): float(share) for n, share in enumerate(shares) if n}
    mean = float(np.concatenate(firsts).mean())
    return [[np.array(x) for x in some] for some in nats], {**hindsight, "mean": mean}


def _bits(texts: Sequence[_Text], nats: Sequence[np.ndarray], half: bool | None) -> float:
    """Return bits per byte of all windows, or of those that thresholds are (not) chosen on."""
    scores = []
    for text, values in zip(texts, nats, strict=True):
        which = np.ones(len(values), bool) if half is None else text.chosen_on == half
        counts = [w.scored for w in text.windows]
        parts = np.stack([values, np.array(counts), np.array(text.sizes)], 1)[which]
        if len(parts):
            scores.append(Scores(text.label, text.weight, parts, len(parts), 0))
    if not sum(s.bytes for s in scores):
        raise UserError("--tolerance needs two documents to score, or more; raise --max-tokens")
    return bits_per_byte(scores)[0]


def _flops(loaded: LoadedModel, texts: Sequence[_Text], passes: int, half: bool | None) -> float:
    """Return the mean FLOPs of the scored tokens with so many passes each."""
    positions = np.concatenate(
        [
            np.arange(len(w.inputs) - w.scored, len(w.inputs)) + 1
            for text in texts
            for w, flag in zip(text.windows, text.chosen_on, strict=True)
            if half is None or flag == half
        ]
    )
    nothing = np.zeros_like(positions)
    used = DepthUsed(positions, nothing + passes, nothing, nothing)
    return float(flops(used, loaded.model.model_config, loaded.model.vocab_size).mean())


def _show(result: dict[str, Any]) -> None:
    columns = ("exit", "passes", "bits per byte", "of as many fixed passes", "MFLOP of a token")
    table = titled_table(f"{result['checkpoint']}: {result['tokens']:,} tokens", *columns)
    for row in result["exits"]:
        depth = row["depth"]
        table.add_row(
            row["exit"] + " *" * (row["exit"] == result["chosen"]),
            f"{depth['mean_passes']:.2f}",
            f"{row['bits_per_byte']:.4f}",
            f"{row['bits_per_byte_of_fixed_passes']:.4f}",
            f"{depth['flops_per_token'] / 1e6:,.2f}",
        )
    table.add_section()
    for number, bits in result["fixed_passes"].items():
        cost = f"{result['fixed_flops_per_token'][number] / 1e6:,.2f}"
        table.add_row("fixed", f"{int(number):.2f}", f"{bits:.4f}", f"{bits:.4f}", cost)
    show_table(table)
    shares = {n: s for n, s in result["hindsight"].items() if n != "mean"}
    print(
        f"in hindsight {result['hindsight']['mean']:.2f} passes: the likeliest token is the last "
        "pass's from pass " + ", ".join(f"{n} ({share:.0%})" for n, share in shares.items())
    )
    if result["tolerance"] is not None:
        chosen = result["chosen"] or "none"
        print(f"chosen (*) on other text, at most {result['tolerance']:g} bits worse: {chosen}")
