"""``python -m pretrain replay FILE``: a step that was not finite, once more on one process.

The file has the micro-batches of the process where it happened, what random numbers depend on, the
settings, and the weights, or for a large model the path of the last checkpoint before.
"""

from __future__ import annotations

import argparse
import io
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.state import load_weights, read_state
from pretrain.common.dtypes import DTYPES
from pretrain.common.errors import UserError
from pretrain.common.files import write_bytes
from pretrain.config import ParallelConfig, RunConfig, load_saved_config, to_yaml
from pretrain.data.batch import Batch
from pretrain.data.sequences import Sequences
from pretrain.model.build import build_stages
from pretrain.model.float8 import multiply_in_float8
from pretrain.parallel.processes import gather, process_groups
from pretrain.run_directory import CONFIG_FILE
from pretrain.training.engine import Engine
from pretrain.training.origin import search
from pretrain.training.origin_text import describe_origin
from pretrain.training.result import EXIT_NON_FINITE

FORMAT = 1
WHOLE_BYTES = 2**28  # of weights that a file holds at most


def main(arguments: list[str]) -> int:
    """Run the command; return 3 where the step is not finite again, else 0."""
    parser = argparse.ArgumentParser(prog="python -m pretrain replay", description=__doc__)
    parser.add_argument("file", type=Path, help="runs/NAME/replay/step-N.pt")
    options = parser.parse_args(arguments)
    values = read_replay(options.file)
    with process_groups(ParallelConfig()):
        return _replay(values)


def collect_weights(engine: Engine) -> dict[str, Tensor] | None:
    """Return all weights in full on the host; None where they are too large for a file.

    Every process must call.
    """
    local = engine.backend.weights_state(saving=True)
    size = sum(
        t.numel() * t.element_size() for boxes in local.values() for t in boxes.parts.values()
    )
    if sum(gather(size)) > WHOLE_BYTES:
        return None
    parts = {
        name: (tuple(boxes.full_shape), [(tuple(at), t.cpu()) for at, t in boxes.parts.items()])
        for name, boxes in local.items()
    }
    weights: dict[str, Tensor] = {}
    for each in gather(parts):
        for name, (shape, boxes) in each.items():
            for offsets, tensor in boxes:
                if name not in weights:
                    weights[name] = torch.empty(shape, dtype=tensor.dtype)
                inside = tuple(slice(a, a + n) for a, n in zip(offsets, tensor.shape, strict=True))
                weights[name][inside] = tensor
    return weights


def write_replay(
    file: Path,
    config: RunConfig,
    *,
    step: int,
    place: tuple[int, int],
    batches: Sequence[Batch],
    weights: dict[str, Tensor] | None,
    checkpoint: Path | None,
    sentence: str,
) -> None:
    """Write what repeats ``step``, of the micro-batches of a data-parallel rank of how many."""
    values = {
        "format": FORMAT,
        "config": to_yaml(config),
        "step": step,
        "place": list(place),
        "batches": [
            {
                "tokens": batch.tokens,
                "targets": batch.targets,
                "loss_mask": batch.loss_mask,
                "cu_seqlens": batch.cu_seqlens,
                "prefixes": batch.sequences.prefixes,
                "masked": batch.masked,
            }
            for batch in batches
        ],
        "weights": weights,
        "checkpoint": None if checkpoint is None else str(checkpoint.resolve()),
        "sentence": sentence,
    }
    content = io.BytesIO()
    torch.save(values, content)
    file.parent.mkdir(exist_ok=True)
    write_bytes(file, content.getvalue())


def read_replay(file: Path) -> dict[str, Any]:
    """Return what :func:`write_replay` has written. Raises UserError for anything else."""
    expected = (
        "expected a file of runs/NAME/replay, which a run writes at a step that is not finite"
    )
    if not file.is_file():
        raise UserError(f"{file} is no file, {expected}")
    try:
        values = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # of many kinds
        raise UserError(f"{file} cannot be read as such a file, {expected}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise UserError(f"{file} has the format {found!r}, expected {FORMAT}, of this version")
    return values


def _replay(values: dict[str, Any]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG_FILE
        path.write_text(values["config"])
        config = load_saved_config(path)
    print(f"written: {values['sentence']}")
    engine = _engine(config, values)
    batches = [_batch(one) for one in values["batches"]]
    found = search(engine, batches, config.seed, values["step"] - 1, tuple(values["place"]))
    if found.finite:
        print(f"now: step {values['step']}: loss {found.loss:.4f}, and every gradient is finite")
        return 0
    batch = None if found.event is None else batches[found.event.micro_batch]
    loss = f"loss {found.loss:.4f}" if math.isfinite(found.loss) else f"loss {found.loss}"
    print(f"now: step {values['step']}: {loss}, {describe_origin(found, config.model, batch)}")
    return EXIT_NON_FINITE


def _batch(values: dict[str, Any]) -> Batch:
    sequences = Sequences(values["cu_seqlens"])
    if values["prefixes"] is not None:
        sequences = sequences.with_prefixes(values["prefixes"])
    tokens, targets, mask = (values[name] for name in ("tokens", "targets", "loss_mask"))
    return Batch(tokens, targets, mask, sequences, masked=values["masked"])


def _engine(config: RunConfig, values: dict[str, Any]) -> Engine:
    """Return the engine of one process with the weights of the step."""
    train, vocab_size = config.train, config.model.vocab_size
    assert vocab_size is not None  # which a run writes
    stages = build_stages(
        config.model,
        vocab_size,
        seed=config.seed,
        seq_len=train.seq_len,
        dtype=DTYPES[train.precision],
        activation_checkpointing=train.activation_checkpointing,
    )
    for stage in stages:
        stage.segment_tokens = train.segment_tokens
        if train.precision == "fp8":
            multiply_in_float8(stage, stage.context)
    if values["weights"] is not None:
        parameters = dict(stages[0].named_parameters())
        with torch.no_grad():
            for name, weight in values["weights"].items():
                parameters[name].copy_(weight)
    else:
        checkpoint = None if values["checkpoint"] is None else Path(values["checkpoint"])
        _load(stages[0], checkpoint, values["step"])
    return Engine(stages, config.optimizer, ParallelConfig())


def _load(model: Any, checkpoint: Path | None, step: int) -> None:
    """Load the weights of the last checkpoint, and say how much earlier they are."""
    if checkpoint is None:
        print(
            "the model was too large for the file, and there was no checkpoint: these are the "
            "weights at the start"
        )
        return
    if not checkpoint.is_dir():
        raise UserError(f"the weights are those of {checkpoint}, which is gone")
    load_weights(checkpoint, model)
    saved = read_state(checkpoint).step
    print(f"the weights are those of {checkpoint}, {step - 1 - saved} steps before step {step}")
