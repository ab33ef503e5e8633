"""``python -m evals layers RUN --convert MIXER``: which attention layers matter most.

Each attention layer alone becomes the mixer, as ``initialize.convert`` begins it, before anything
is trained; or with ``--aligned RUN`` the one that alignment has trained in its place. What that
costs is the Kullback-Leibler divergence of the next token's distribution from the whole model's, on
validation text, and what is lost of a task whose answers are generated. They rank layers
differently (docs/convert.md). Those that cost most are the ones to keep.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from evals.held_out import Documents, Window, open_held_out, ratio, sample
from pretrain.common.argument_types import count, positive
from pretrain.common.errors import UserError, nearest
from pretrain.common.files import file_name, write_json
from pretrain.common.outputs import check_folder
from pretrain.common.screen import show_table, titled_table
from pretrain.common.yaml_text import parse_value
from pretrain.config import InitializeConfig, ModelConfig
from pretrain.config.conversion import ATTENTION, written_pattern
from pretrain.data.sequences import Sequences
from pretrain.inference.load import LoadedModel, load_model
from pretrain.model.build import build_model
from pretrain.model.language_model import LanguageModel
from pretrain.model.spec import block_specs, check_model, converted_settings
from pretrain.nn.mixers import registry
from pretrain.training.initialization import fill_from

METRICS = ("kl", "recall")
Start = Literal["qkvo", "none"]
_NAME = "converted"  # of the mixer in the pattern: the model may have others of its kind


def main(arguments: Sequence[str]) -> int:
    """Measure what every attention layer is worth, print a table and write a JSON file."""
    given = _parser().parse_intermixed_args(arguments)
    metrics = list(dict.fromkeys(name for name in given.metric.split(",") if name))
    if not metrics or set(metrics) - set(METRICS):
        raise UserError(f"--metric is '{given.metric}', expected some of {', '.join(METRICS)}")
    if "recall" in metrics:
        from evals.tasks.loading import check_tasks

        check_tasks([given.recall])
    loaded = load_model(given.run)
    aligned = None if given.aligned is None else load_model(given.aligned)
    check_folder(loaded.evals_directory, "the folder for results")
    result = rank_layers(
        loaded,
        given.convert,
        dict(_setting(text) for text in given.settings),
        start=given.start,
        metrics=metrics,
        data=given.data,
        tokens=given.tokens,
        seed=given.seed,
        recall=given.recall,
        limit=given.limit,
        max_length=given.max_length,
        keep=given.keep,
        aligned=aligned,
    )
    digest = hashlib.sha256(repr(sorted(vars(given).items())).encode()).hexdigest()[:8]
    (mixer,) = result["convert"]
    name = file_name(f"layers-{mixer}-{loaded.checkpoint.name}-{digest}")
    path = loaded.evals_directory / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    _show(result, path)
    return 0


def rank_layers(
    loaded: LoadedModel,
    mixer: str | None,
    settings: dict[str, Any] | None = None,
    *,
    start: Start = "qkvo",
    metrics: Sequence[str] = ("kl",),
    data: str | None = None,
    tokens: int = 16_384,
    seed: int = 0,
    recall: str = "passkey",
    limit: int = 100,
    max_length: int | None = None,
    keep: int | None = None,
    aligned: LoadedModel | None = None,
) -> dict[str, Any]:
    """Return what converting each attention layer alone to ``mixer`` costs, the dearest first.

    ``settings`` are of the mixer, ``start`` as in ``initialize.convert``. ``metrics``: ``kl``, in
    nats per token of about ``tokens`` tokens of validation text that ``seed`` draws, and
    ``recall``, the loss of the score of task ``recall`` over ``limit`` documents, in requests of
    ``max_length`` tokens at most (the training length); the first one ranks. ``keep`` is how many
    layers shall stay attention (a quarter). ``aligned`` is a model whose new mixers alignment with
    this one has trained, which then take the layers' places; ``mixer``, ``settings`` and ``start``
    are not looked at. Raises UserError where nothing can be converted.
    """
    if aligned is None:
        assert mixer is not None
        _check_mixer(mixer, start)
    specs, where = block_specs(loaded.model.model_config), str(loaded.checkpoint)
    attention = {registry()[name] for name in ATTENTION}
    layers = [i for i, spec in enumerate(specs) if spec.mixer in attention]
    if not layers:
        pattern = loaded.model.model_config.pattern
        raise UserError(f"{where} is '{pattern}', which has no attention to convert")
    if aligned is not None:
        layers, mixer = aligned_layers(loaded, aligned, layers)
    if keep is not None and keep > len(layers):
        raise UserError(f"--keep is {keep}, but {where} has {len(layers)} attention layers")
    windows = _windows(loaded, data, tokens, seed) if "kl" in metrics else []
    before = _recall(loaded, recall, limit, max_length) if "recall" in metrics else (0.0, 0.0)
    rows = []
    for layer in layers:
        if aligned is None:
            model = convert_layer(loaded, layer, str(mixer), settings or {}, start)
        else:
            model = take_layer(loaded, layer, aligned)
        row: dict[str, Any] = {"layer": layer}
        if "kl" in metrics:
            row["kl"], row["kl_stderr"] = divergence(loaded, model, windows)
        if "recall" in metrics:
            converted = dataclasses.replace(loaded, model=model)
            score, error = _recall(converted, recall, limit, max_length)
            row["recall"] = before[0] - score
            row["recall_stderr"] = math.hypot(error, before[1])
        rows.append(row)
    rows.sort(key=lambda row: -row[metrics[0]])
    order = [row["layer"] for row in rows]
    count = -(-len(layers) // 4) if keep is None else keep
    return {
        "task": "layers",
        "convert": {mixer: start if aligned is None else "aligned"},
        "settings": settings or {},
        "aligned": None if aligned is None else str(aligned.checkpoint),
        "metrics": list(metrics),
        "layers": rows,
        "keep": sorted(order[:count]),
        "keep_by_count": {str(n): sorted(order[:n]) for n in range(len(order) + 1)},
        "recall": {"task": recall, "limit": limit, "score": before[0], "stderr": before[1]}
        if "recall" in metrics
        else None,
        "tokens": int(sum(w.scored for _, group in windows for w in group)),
        "seed": seed,
        "checkpoint": where,
        "step": loaded.state.step,
    }


def _check_mixer(mixer: str, start: str) -> None:
    known = registry()
    if mixer not in known:
        raise UserError(
            f"--convert is '{mixer}'{nearest(mixer, list(known))}, expected one of: "
            f"{', '.join(known)}"
        )
    if start == "qkvo" and known[mixer].conversion is None:
        able = [name for name, other in known.items() if other.conversion is not None]
        raise UserError(
            f"--convert is {mixer}, which cannot take over attention; expected --start none, or "
            f"one of: {', '.join(able)}"
        )


def convert_layer(
    loaded: LoadedModel, layer: int, mixer: str, settings: dict[str, Any], start: Start
) -> LanguageModel:
    """Return the model with one attention layer converted, in evaluation mode."""
    source = loaded.model.model_config
    given = {"kind": mixer, **settings}
    if start == "qkvo":
        given = converted_settings(_NAME, given, _one_layer(source, layer), "--convert")
    return _with_layer(loaded, layer, given, start)


def _with_layer(
    loaded: LoadedModel, layer: int, given: dict[str, Any], start: Start
) -> LanguageModel:
    source = loaded.model.model_config
    names = [spec.name for spec in block_specs(source)]
    names[layer] = _NAME
    mixers = {**source.mixers, _NAME: given}
    config = dataclasses.replace(source, pattern=written_pattern(names), mixers=mixers)
    check_model(config, "--convert")
    model = build_model(config, loaded.model.vocab_size, seed=0, context=loaded.model.context)
    how = InitializeConfig(str(loaded.checkpoint), convert={_NAME: start})
    fill_from(model, loaded.model, how, str(loaded.checkpoint))
    return model.eval()


def aligned_layers(
    loaded: LoadedModel, aligned: LoadedModel, attention: Sequence[int]
) -> tuple[list[int], str]:
    """Return the attention layers that are another mixer in the aligned model, and that mixer.

    Raises UserError where the two models cannot be compared, or more than one mixer is new.
    """
    ours, theirs = (x.model.model_config for x in (loaded, aligned))
    specs, others = block_specs(ours), block_specs(theirs)
    where = f"--aligned is {aligned.checkpoint}"
    sizes = [(m.hidden_size, len(s), m.recursion) for m, s in ((ours, specs), (theirs, others))]
    if sizes[0] != sizes[1] or ours.recursion is not None:
        raise UserError(
            f"{where}, of {sizes[1][1]} blocks {sizes[1][0]} wide, expected a model without "
            f"a loop, aligned with {loaded.checkpoint}, of {sizes[0][1]} blocks {sizes[0][0]} wide"
        )
    layers = [i for i in attention if specs[i].identity != others[i].identity]
    found = {others[i].name for i in layers}
    if len(found) != 1:
        raise UserError(
            f"{where}, '{theirs.pattern}', where {len(found)} mixers are in the place of attention "
            f"of '{ours.pattern}', expected one"
        )
    name, spec = found.pop(), others[layers[0]]
    if spec.mixer.first_values(spec.config, ours.hidden_size) or spec.mixer.shared_tables(
        spec.config, ours.hidden_size
    ):
        raise UserError(f"{where}, whose {name} layers share values; one alone cannot be taken")
    return layers, name


@torch.no_grad()
def take_layer(loaded: LoadedModel, layer: int, aligned: LoadedModel) -> LanguageModel:
    """Return the model with an aligned mixer in the place of one layer, in evaluation mode."""
    theirs = aligned.model.model_config
    name = block_specs(theirs)[layer].name
    settings = theirs.mixers.get(name) or {}
    model = _with_layer(loaded, layer, {"kind": name, **settings}, "none")
    own = dict(aligned.model.named_parameters())
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.startswith(f"blocks.{layer}.mixer."):
            parameter.copy_(own[parameter_name])
    return model


def _one_layer(source: ModelConfig, layer: int) -> ModelConfig:
    """Return a model of one of the blocks alone, whose attention gives the sizes."""
    name = block_specs(source)[layer].name
    return dataclasses.replace(source, pattern=name, recursion=None)


@torch.no_grad()
def divergence(
    loaded: LoadedModel, model: LanguageModel, windows: Sequence[tuple[int, list[Window]]]
) -> tuple[float, float | None]:
    """Return the mean divergence of ``model`` from the loaded one in nats, and its standard error.

    ``windows`` are those of each source, with how many there are to draw from; without an error
    where that is all of them.
    """
    strata = []
    for available, group in windows:
        parts = []
        for window in group:
            ids = torch.from_numpy(window.inputs)[None].to(next(model.parameters()).device)
            packed = Sequences.from_lengths([ids.shape[1]], ids.device)
            true, found = (
                m(ids, sequences=packed)[0, -window.scored :, : loaded.candidates]
                .double()
                .log_softmax(-1)
                for m in (loaded.model, model)
            )
            parts.append((float((true.exp() * (true - found)).sum()), window.scored))
        array = np.array(parts, np.float64)
        strata.append((array[:, 0], array[:, 1], available))
    return ratio(strata)


def _windows(
    loaded: LoadedModel, data: str | None, tokens: int, seed: int
) -> list[tuple[int, list[Window]]]:
    """Return windows of each source's validation documents, as perplexity draws them."""
    size = loaded.run.train.seq_len
    streams = [stream for stream in open_held_out(loaded, data).valid if len(stream)]
    if not streams:
        raise UserError(f"{loaded.checkpoint}: there are no validation documents to score")
    sources = [Documents(s, loaded.opening_id, size, max(size // 2, 1)) for s in streams]
    numbers = sample([(d.num_windows, d.num_tokens) for d in sources], tokens, seed)
    return [
        (d.num_windows, [d.window(int(n)) for n in chosen])
        for d, chosen in zip(sources, numbers, strict=True)
    ]


def _recall(
    loaded: LoadedModel, task: str, limit: int, max_length: int | None
) -> tuple[float, float]:
    """Return the score of a task whose answers are generated, and its standard error."""
    from evals.harness.checkpoint_evaluation import evaluate_checkpoint

    bos = "document" if loaded.imported is None else "model"
    ((_, result),) = evaluate_checkpoint(
        loaded, [task], limit=limit, bos=bos, max_length=max_length
    )
    metric, score = next(iter(result["scores"].items()))
    return float(score), float(result["stderr"].get(metric) or 0.0)


def _show(result: dict[str, Any], path: Path) -> None:
    (mixer,) = result["convert"]
    titles = {"kl": "KL, nats per token", "recall": "loss of recall"}
    if result["recall"] is not None:
        recall = result["recall"]
        titles["recall"] += f" ({recall['task']}, {recall['score']:.4f} before)"
    table = titled_table(
        f"one attention layer made {mixer}" + ", aligned" * (result["aligned"] is not None),
        *("layer", *(titles[name] for name in result["metrics"])),
    )
    for row in result["layers"]:
        cells = [
            f"{row[name]:.4g}" + (f" ± {error:.2g}" if (error := row[f"{name}_stderr"]) else "")
            for name in result["metrics"]
        ]
        table.add_row(str(row["layer"]), *cells)
    show_table(table)
    kept = ",".join(map(str, result["keep"]))
    print(f"to keep {len(result['keep'])}: initialize.keep=[{kept}]")
    print(f"written to {path}")


def _setting(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not name or not sign:
        raise UserError(f"'{text}' is no setting of the mixer, expected NAME=VALUE")
    return name, parse_value(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evals layers",
        description="Convert each attention layer alone, untrained or aligned, and rank them by "
        "what it costs. Scores of generated answers and of likelihood rank differently: look at "
        "both.",
    )
    parser.add_argument("run", help="a run directory, or one of its checkpoints/step-N")
    parser.add_argument("settings", nargs="*", help="of the mixer, such as window=128")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--convert", help="the mixer, such as gdn, untrained")
    how.add_argument(
        "--aligned",
        help="a run that learned from this one by alignment (distill.align_steps), whose mixers to "
        "take, one at a time",
    )
    parser.add_argument("--start", choices=("qkvo", "none"), default="qkvo")
    parser.add_argument(
        "--metric",
        default="kl",
        help="kl, recall or both, of which the first ranks (kl)",
    )
    parser.add_argument("--keep", type=count, help="layers to keep (a quarter of them)")
    parser.add_argument("--data", help="a prepared data directory (the run's)")
    parser.add_argument(
        "--tokens", type=positive, default=16_384, help="tokens of validation text (16384)"
    )
    parser.add_argument("--seed", type=count, default=0, help="of which text is drawn (0)")
    parser.add_argument(
        "--recall", default="passkey", help="task whose answers are generated (passkey)"
    )
    parser.add_argument(
        "--max-length", type=positive, help="tokens of its requests (training length)"
    )
    parser.add_argument("--limit", type=positive, default=100, help="documents of it (100)")
    return parser
