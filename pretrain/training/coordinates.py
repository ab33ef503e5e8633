"""``python -m pretrain coordinates CONFIG``: do activations and updates keep their size with width?

The check of maximal-update parametrization (arXiv 2203.03466, appendix D.1): models of several
widths, otherwise alike, train a few steps; then what every layer and every matrix puts out is
compared with what it put out before, for the same tokens. Where both the outputs and their changes
are as large at every width, a learning rate that was tuned at one width holds at the others.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pretrain.common.errors import UserError
from pretrain.config import ParallelConfig, RunConfig, load_run_config
from pretrain.data.batches import Batch, TrainingBatches, open_data
from pretrain.model.block import Block
from pretrain.model.build import build_model, padded_vocab_size
from pretrain.model.language_model import LanguageModel
from pretrain.model.spec import block_specs
from pretrain.model.widths import widened
from pretrain.nn.moe import MoE
from pretrain.parallel.processes import local_device, process_groups
from pretrain.training.coordinates_report import Place, Sizes, draw, print_table
from pretrain.training.engine import Engine

EXIT_NOT_FLAT = 4
_PRODUCTS: tuple[Any, ...] = (F.linear, F.embedding, torch.bmm, torch.baddbmm)


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status, 0 or 4 where a size follows the width."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain coordinates",
        description="Train a few steps at several widths, and compare the sizes of activations and "
        "of their changes. Heads keep their size and become more.",
        epilog=f"Exit status: 0 flat, {EXIT_NOT_FLAT} where a size follows the width, 2 bad input.",
    )
    parser.add_argument("config", help="of a run whose data are prepared")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps (3)")
    parser.add_argument("--seeds", type=int, default=3, help="models of each width (3)")
    parser.add_argument("--picture", type=Path, default=Path("coordinates.png"))
    options = parser.parse_intermixed_args(arguments)
    widths = sorted(set(options.widths))
    if len(widths) < 2 or widths[0] < 1:
        raise UserError(f"--widths are {options.widths}, expected two or more from 1")
    for name, least in (("steps", 1), ("seeds", 2)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} is {getattr(options, name)}, expected at least {least}")
    config = load_run_config(options.config, options.overrides)
    models = {w: widened(config.model, w, options.config) for w in widths}
    for width, model in models.items():
        block_specs(model, f"{options.config} at width {width}")
    data = open_data(config.data)
    vocab_size = padded_vocab_size(config.model, data.tokenizer.vocab_size)
    sizes: Sizes = {}
    for width in widths:
        for seed in range(options.seeds):
            wide = copy.deepcopy(config)
            wide.model, wide.seed = models[width], config.seed + seed
            source = TrainingBatches(
                data, config.train, config.parallel.micro_batch_size, wide.seed
            )
            batches = [source.micro_batches(step)[0] for step in range(options.steps + 1)]
            for place, found in measure(wide, vocab_size, batches[1:], batches[0]).items():
                sizes.setdefault(place, {}).setdefault(seed, {})[width] = found
        print(f"width {width}: {options.seeds} models trained {options.steps} steps", flush=True)
    base, kind = config.model.mup_base_hidden_size, config.optimizer.kind
    rule = "standard parametrization" if base is None else f"maximal update from width {base}"
    title = f"{config.name}: {rule}, {kind}, lr {config.optimizer.lr:g}, {options.steps} steps"
    flat = print_table(sizes, title)
    draw(sizes, title, options.picture)
    print(f"drawn in {options.picture}")
    if base is None and not flat:
        print(f"with model.mup_base_hidden_size={widths[0]} sizes should not follow the width")
    return 0 if flat else EXIT_NOT_FLAT


@dataclass
class _Outputs:
    """What the model put out at each place for some tokens, in the order of the calls."""

    tensors: dict[Place, list[Tensor]]

    def sizes_against(self, before: _Outputs) -> dict[Place, tuple[float, float]]:
        """Return the root mean squares of these outputs and of their change."""
        found = {}
        for place, tensors in self.tensors.items():
            changes = [a - b for a, b in zip(tensors, before.tensors[place], strict=True)]
            found[place] = (_rms(tensors), _rms(changes))
        return found


def _rms(tensors: Sequence[Tensor]) -> float:
    squares = sum(float(t.double().square().sum()) for t in tensors)
    return float((squares / sum(t.numel() for t in tensors)) ** 0.5)


def measure(
    config: RunConfig, vocab_size: int, batches: Sequence[Batch], probe: Batch
) -> dict[Place, tuple[float, float]]:
    """Train a new model one step on each batch; return sizes of its outputs for ``probe``, by place.

    They are root mean squares after the steps, and of the change since the start. The learning rate
    is ``optimizer.lr``, and numbers are float32, in which small updates are not rounded away.
    """
    model = build_model(config.model, vocab_size, seed=config.seed)
    device = local_device()
    probe, one = probe.to(device), ParallelConfig(zero_stage=0)
    with process_groups(one):
        engine = Engine(model, config.optimizer, one)
        before = _outputs(model, probe)
        for step, batch in enumerate(batches):
            engine.begin_step(config.seed, step)
            engine.train_step([batch.to(device)], config.optimizer.lr)
        return _outputs(model, probe).sizes_against(before)


@torch.no_grad()
def _outputs(model: LanguageModel, batch: Batch) -> _Outputs:
    model.eval()
    with _Recorder(model) as recorder, _layer_hooks(model, recorder.outputs):
        model(batch.tokens, sequences=batch.sequences)
    model.train()
    return recorder.outputs


def _note(outputs: _Outputs, place: Place, tensor: Tensor) -> None:
    outputs.tensors.setdefault(place, []).append(tensor.detach())


@contextmanager
def _layer_hooks(model: LanguageModel, outputs: _Outputs) -> Iterator[None]:
    """Note what mixers and MLPs add to the residual stream, and the stream after each block."""
    handles = []
    specs = block_specs(model.model_config)
    for index, spec in enumerate(specs):
        block = cast(Block, model.blocks[index])
        named: dict[str, nn.Module] = {spec.name: block.mixer, "residual stream": block}
        if block.mlp is not None:
            named["experts" if isinstance(block.mlp, MoE) else "mlp"] = block.mlp
        for name, module in named.items():
            place = Place(name, str(index), layer=True)

            def note(_: nn.Module, __: Any, output: Any, place: Place = place) -> None:
                _note(outputs, place, output[0] if isinstance(output, tuple) else output)

            handles.append(module.register_forward_hook(note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Recorder(TorchFunctionMode):
    """Note the result of every product with a parameter, whatever module it belongs to.

    Experts' products are not among them: which tokens they get changes, so that outputs cannot be
    compared one by one.
    """

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.outputs = _Outputs({})
        names = [spec.name for spec in block_specs(model.model_config)]
        self._places = {
            id(parameter): _place_of(name, names)
            for name, parameter in model.named_parameters()
            if parameter.ndim > 1
        }
        self._tied = id(model.embedding.weight)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _PRODUCTS:
            for argument in (*args, *(kwargs or {}).values()):
                place = self._place(argument)
                if place is not None:
                    if place.name == "embedding" and function is F.linear:
                        place = Place("head")
                    _note(self.outputs, place, result)
        return result

    def _place(self, argument: Any) -> Place | None:
        if not isinstance(argument, Tensor):
            return None
        # A part of a parameter, such as one pass's low-rank difference, is a view of it.
        base = argument._base if argument._base is not None else argument
        return self._places.get(id(base))


def _place_of(name: str, mixers: Sequence[str]) -> Place:
    """Return the place of a parameter: ``blocks.3.mixer.q_proj.weight`` is ``gdn.q_proj`` of 3."""
    parts = [part for part in name.split(".") if part not in ("weight", "inner")]
    if parts[0] != "blocks":
        return Place(".".join(parts))
    index, owner, *rest = parts[1:]
    owner = mixers[int(index)] if owner == "mixer" else owner
    return Place(".".join([owner, *rest]), index)
