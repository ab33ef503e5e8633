"""``python -m pretrain coordinates CONFIG``: do activations and updates keep their size with width?

The check of maximal-update parametrization (arXiv 2203.03466, appendix D.1): models of several
widths, otherwise alike, train a few steps on the same tokens. The outputs of every layer are then
compared with those before, and the products with every matrix with those of the matrix at the
start. Where outputs and changes are as large at every width, a learning rate that was tuned at one
holds at the others.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pretrain.common.errors import UserError
from pretrain.common.outputs import check_file
from pretrain.config import ParallelConfig, RunConfig, load_run_config
from pretrain.data.batch import Batch
from pretrain.data.batches import TrainingBatches, open_data
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
_PRODUCTS: tuple[Any, ...] = (F.linear, F.embedding, F.grouped_mm, torch.bmm, torch.baddbmm)


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
    parser.add_argument("--seeds", type=int, default=4, help="models of each width (4)")
    parser.add_argument("--picture", type=Path, default=Path("coordinates.png"))
    options = parser.parse_intermixed_args(arguments)
    check_file(options.picture, "--picture")
    widths = sorted(set(options.widths))
    if len(widths) < 2 or widths[0] < 1:
        raise UserError(f"--widths are {options.widths}, expected two or more from 1")
    for name, least in (("steps", 1), ("seeds", 3)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} is {getattr(options, name)}, expected at least {least}")
    config = load_run_config(options.config, options.overrides)
    models = {w: widened(config.model, w, options.config) for w in widths}
    for width, model in models.items():
        block_specs(model, f"{options.config} at width {width}")
    data = open_data(config.data)
    vocab_size = padded_vocab_size(config.model, config.data.ids(data.tokenizer.vocab_size))
    sizes: Sizes = {}
    for width in widths:
        for seed in range(options.seeds):
            wide = copy.deepcopy(config)
            wide.model, wide.seed = models[width], config.seed + seed
            source = TrainingBatches(
                data,
                config.train,
                config.parallel.micro_batch_size,
                wide.seed,
                config.data.prefix,
            )
            (batch, *_) = source.micro_batches(0)
            for place, found in measure(wide, vocab_size, batch, options.steps).items():
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


def measure(
    config: RunConfig, vocab_size: int, batch: Batch, steps: int
) -> dict[Place, tuple[float, float]]:
    """Train a new model some steps on one batch; return sizes for its tokens, by place.

    They are root mean squares after the steps: of the output; and of its change since the start,
    for a matrix of what its change does to its present input. The learning rate is
    ``optimizer.lr``, and numbers are float32, in which small updates are not rounded away.
    """
    model = build_model(config.model, vocab_size, seed=config.seed)
    device = local_device()
    batch, one = batch.to(device), ParallelConfig(zero_stage=0)
    start = {id(p): p.detach().clone() for p in model.parameters() if p.ndim > 1}
    before = _layer_outputs(model, batch)
    with process_groups(one):
        engine = Engine(model, config.optimizer, one)
        for step in range(steps):
            engine.begin_step(config.seed, step)
            engine.train_step([batch], config.optimizer.lr)
    with _Products(model, start) as products:
        after = _layer_outputs(model, batch)
    sizes = {place: (_rms(now), _rms(change)) for place, (now, change) in products.found.items()}
    for place, outputs in after.items():
        changes = [a - b for a, b in zip(outputs, before[place], strict=True)]
        sizes[place] = (_rms(outputs), _rms(changes))
    return sizes


def _rms(tensors: Sequence[Tensor]) -> float:
    squares = sum(float(t.double().square().sum()) for t in tensors)
    return float((squares / sum(t.numel() for t in tensors)) ** 0.5)


@torch.no_grad()
def _layer_outputs(model: LanguageModel, batch: Batch) -> dict[Place, list[Tensor]]:
    """Return what mixers and MLPs add to the residual stream, and the stream after each block.

    Each has a tensor for each pass of a loop.
    """
    found: dict[Place, list[Tensor]] = {}
    handles = []
    for index, spec in enumerate(block_specs(model.model_config)):
        block = cast(Block, model.blocks[index])
        named: dict[str, nn.Module] = {spec.name: block.mixer, "residual stream": block}
        if block.mlp is not None:
            named["experts" if isinstance(block.mlp, MoE) else "mlp"] = block.mlp
        for name, module in named.items():

            def note(_: nn.Module, __: Any, output: Any, place: Place) -> None:
                output = output[0] if isinstance(output, tuple) else output
                found.setdefault(place, []).append(output.detach())

            place = Place(name, str(index), layer=True)
            handles.append(module.register_forward_hook(partial(note, place=place)))
    model.eval()
    model(batch.tokens, sequences=batch.sequences)
    model.train()
    for handle in handles:
        handle.remove()
    return found


class _Products(TorchFunctionMode):
    """Note the result of every product with a parameter, whatever module it belongs to.

    ``found`` has the results, and by how much they would be others with the parameters of the
    start.
    """

    def __init__(self, model: LanguageModel, start: dict[int, Tensor]):
        super().__init__()
        self.found: dict[Place, tuple[list[Tensor], list[Tensor]]] = {}
        names = [spec.name for spec in block_specs(model.model_config)]
        self._start = start
        self._places = {id(p): _place_of(name, names) for name, p in model.named_parameters()}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _PRODUCTS:
            for number, argument in enumerate(args):
                first = self._at_start(argument)
                if first is not None:
                    place = self._places[id(_owner(argument))]
                    if place.name == "embedding" and function is F.linear:
                        place = Place("head")
                    unchanged = function(*args[:number], first, *args[number + 1 :], **kwargs or {})
                    results, changes = self.found.setdefault(place, ([], []))
                    results.append(result)
                    changes.append(result - unchanged)
        return result

    def _at_start(self, argument: Any) -> Tensor | None:
        """Return what a parameter, or a view of one, was at the start; None for other arguments."""
        if not isinstance(argument, Tensor) or id(_owner(argument)) not in self._start:
            return None
        owner = _owner(argument)
        offset = argument.storage_offset() - owner.storage_offset()
        return self._start[id(owner)].as_strided(argument.size(), argument.stride(), offset)


def _owner(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base


def _place_of(name: str, mixers: Sequence[str]) -> Place:
    """Return the place of a parameter: ``blocks.3.mixer.q_proj.weight`` is ``gdn.q_proj`` of 3."""
    parts = [part for part in name.split(".") if part not in ("weight", "inner")]
    if parts[0] != "blocks":
        return Place(".".join(parts))
    index, owner, *rest = parts[1:]
    owner = mixers[int(index)] if owner == "mixer" else owner
    return Place(".".join([owner, *rest]), index)
