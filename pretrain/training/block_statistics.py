"""Statistics of one step, block by block: sizes, gates, memories, and what experts are chosen.

Every process sums up what it has and nobody else counts; sums add up to the same whatever the
layout. Nothing that is watched changes: forward passes are looked at by hooks, gradients and
weights between them and the update.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pretrain.common.metrics import merge_metrics
from pretrain.data.sequences import Sequences
from pretrain.model.block import Block
from pretrain.model.language_model import LanguageModel
from pretrain.model.spec import block_specs
from pretrain.nn.mixers import Mixer, State
from pretrain.nn.moe import MoE
from pretrain.ops.shared.watching import is_backward_pass
from pretrain.parallel.processes import all_reduce_metrics
from pretrain.training.engine import Engine
from pretrain.training.metrics import LayerMetrics

_PARTS = ("", "mixer_", "mlp_")  # of a block: all of it, and what is measured by itself
_ENDS = {"embedding": "embedding", "final_norm": "head", "head": "head"}


class BlockStatistics:
    """The watch over one step of an engine, from :meth:`open` to :meth:`close`."""

    def __init__(self, engine: Engine, layer_metrics: LayerMetrics):
        self._engine, self._layer_metrics = engine, layer_metrics
        self._found: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._loads: dict[str, Tensor] = {}

    def open(self) -> None:
        """Begin to watch."""
        for part in self._engine.parts:
            for number, block in _blocks_of(part):
                self._layer_metrics.add(block.mixer.metrics())  # those of earlier steps
                self._watch_block(str(number), block)
            if part.stage.first:
                self._watch_output("embedding", "activation", part.embedding, part)
            if part.stage.last:
                self._watch_output("head", "activation", part.final_norm, part)
        self._engine.backend.gradients_are_ready = self._before_update

    def close(self) -> None:
        """Look at what the update has changed, and watch no longer."""
        for name, tensor in self._engine.backend.masters() if self._before else ():
            self._measure(name, "update", tensor.detach() - self._before.pop(name))
        self._engine.backend.gradients_are_ready = None
        for handle in self._handles:
            handle.remove()
        for part in self._engine.parts:
            for _, block in _blocks_of(part):
                block.mixer.watcher = None

    def rows(self) -> list[dict[str, Any]]:
        """Return the numbers of each block, those of all processes; every process must call."""
        local = self._numbers()
        for part in self._engine.parts:
            for number, block in _blocks_of(part):
                found = block.mixer.metrics()
                self._layer_metrics.add(found)
                merge_metrics(local, {f"{number}/own/{name}": x for name, x in found.items()})
        merged = all_reduce_metrics(local)
        tree: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
        for name, value in merged.items():
            where, quantity, stat = name.split("/")
            tree[where][quantity][stat] = value
        specs = block_specs(self._engine.parts[0].model_config)
        order = ["embedding", *map(str, range(len(specs))), "head"]
        order += sorted(set(tree) - set(order))
        rows = []
        for name in order:
            if name in tree:
                row: dict[str, Any] = {"block": name}
                if name.isdigit():
                    row = {"block": int(name), "mixer": specs[int(name)].name}
                rows.append(row | _described(tree[name]))
        return rows

    # Forward passes

    def _watch_block(self, name: str, block: Block) -> None:
        def after(_: Any, __: Any, given: dict[str, Any], output: tuple[Tensor, State]) -> None:
            if not is_backward_pass():
                x, state = output
                self._look(name, "activation", x, block.mixer)
                self._look_at_memory(name, block.mixer, state, given.get("sequences"))

        self._handles.append(block.register_forward_hook(after, with_kwargs=True))
        self._watch_output(name, "mixer_activation", block.mixer, block.mixer)
        if block.mlp is not None:
            self._watch_output(name, "mlp_activation", block.mlp, block.mixer)

        def noted(values: Mapping[str, Tensor]) -> None:
            self._look_at_gates(name, values)

        block.mixer.watcher = noted

    def _watch_output(self, name: str, quantity: str, module: Any, owner: Any) -> None:
        def after(_: Any, arguments: Any, output: Any) -> None:
            if not is_backward_pass():
                self._look(
                    name, quantity, output[0] if isinstance(output, tuple) else output, owner
                )

        self._handles.append(module.register_forward_hook(after))

    def _look(self, name: str, quantity: str, x: Tensor, owner: Any) -> None:
        context = owner.parallel if isinstance(owner, Mixer) else owner.context
        # Tensor-parallel ranks have the same activations, unless they share out the tokens.
        if context.sequence_parallel or context.tensor_rank == 0:
            self._add_sizes(f"{name}/{quantity}", x)

    @torch.no_grad()
    def _look_at_gates(self, name: str, values: Mapping[str, Tensor]) -> None:
        for gate, x in values.items():
            finite = x.isfinite()
            if gate == "logits":
                if x.numel():
                    largest = torch.where(finite, x, -torch.inf).amax()
                    self._add(f"{name}/logits/largest_max", largest)
                continue
            self._add(f"{name}/{gate}/sum", torch.where(finite, x, 0).sum(dtype=torch.float64))
            self._add(f"{name}/{gate}/number", finite.sum())

    @torch.no_grad()
    def _look_at_memory(
        self, name: str, mixer: Mixer, state: State, sequences: Sequences | None
    ) -> None:
        memory = mixer.memory(state) if state else None
        if memory is None:
            return
        segment = None if sequences is None else sequences.segment
        following = 0 if segment is None else segment.rank + 1
        if segment is not None and following < segment.size and segment.continues[following]:
            memory = memory[:-1]  # the last sequence ends on another rank
        memory = memory.to(torch.float64)
        self._add(f"{name}/state/norms", memory.square().sum())
        if mixer.parallel.tensor_rank == 0:  # each has the states of its heads
            self._add(f"{name}/state/sequences", torch.tensor(float(len(memory))))
        if memory.ndim == 4 and min(memory.shape[2:]) > 1:
            small = memory if memory.shape[2] <= memory.shape[3] else memory.mT
            squares = (small @ small.mT).square().sum((-2, -1))  # sum of sigma^4
            ranks = memory.square().sum((-2, -1)).square() / squares
            known = ranks.isfinite()
            self._add(f"{name}/rank/sum", torch.where(known, ranks, 0).sum())
            self._add(f"{name}/rank/number", known.sum())

    # Gradients, weights and updates

    def _before_update(self) -> None:
        backend = self._engine.backend
        for name, tensor in backend.gradients():
            self._measure(name, "gradient", tensor)
        for name, tensor in backend.masters():
            self._measure(name, "weight", tensor)
            self._before[name] = tensor.detach().clone()
        for part in self._engine.parts:
            for number, block in _blocks_of(part):
                if isinstance(block.mlp, MoE) and block.mlp.step_load is not None:
                    for expert, count in enumerate(block.mlp.step_load):
                        self._add(f"{number}/load/{expert}", count)

    def _measure(self, parameter: str, quantity: str, x: Tensor) -> None:
        """Count a part of a parameter's tensor for its block, and for mixer or MLP."""
        first, *rest = parameter.split(".")
        if first != "blocks":
            self._add_sizes(f"{_ENDS.get(first, first)}/{quantity}", x)
            return
        for part in _PARTS:
            if not part or rest[1] == part.removesuffix("_"):
                self._add_sizes(f"{rest[0]}/{part}{quantity}", x)

    # Sums

    @torch.no_grad()
    def _add_sizes(self, name: str, x: Tensor) -> None:
        if x.numel() == 0:
            return
        x = x.detach()
        finite = x.isfinite()
        x = torch.where(finite, x, 0)
        self._add(f"{name}/squares", torch.linalg.vector_norm(x, dtype=torch.float64).square())
        self._add(f"{name}/largest_max", x.abs().max())
        self._add(f"{name}/finite", finite.sum())
        self._add(f"{name}/all", torch.tensor(float(finite.numel())))

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach().to(torch.float64)
        before = self._found.get(name)
        if before is not None:
            value = torch.maximum(before, value) if name.endswith("_max") else before + value
        self._found[name] = value

    def _numbers(self) -> dict[str, float]:
        """Return the sums of this process, fetched at once from each device."""
        numbers: dict[str, float] = {}
        for device in {value.device for value in self._found.values()}:
            names = [name for name, value in self._found.items() if value.device == device]
            values = torch.stack([self._found[name] for name in names]).tolist()
            numbers |= dict(zip(names, values, strict=True))
        return numbers


def _blocks_of(part: LanguageModel) -> Iterator[tuple[int, Block]]:
    for number in part.stage.blocks:
        yield number, cast(Block, part.blocks[number])


def _described(found: Mapping[str, dict[str, float]]) -> dict[str, Any]:
    """Return a block's numbers by the names that they are logged under."""
    row: dict[str, Any] = {}
    for quantity, stats in found.items():
        if "squares" in stats:
            row[f"{quantity}_rms"] = _ratio(stats["squares"], stats["finite"], root=True)
            row[f"{quantity}_max"] = stats["largest_max"]
            row[f"{quantity}_nonfinite"] = 1 - stats["finite"] / stats["all"]
    for part in _PARTS:
        if f"{part}update_rms" in row:
            update, weight = row[f"{part}update_rms"], row[f"{part}weight_rms"]
            row[f"{part}update_ratio"] = update / weight if update is not None and weight else None
    if "logits" in found:
        largest = found["logits"]["largest_max"]
        row["logit_max"] = largest if math.isfinite(largest) else None
    for gate, stats in found.items():
        if gate == "log_decay":
            mean = _ratio(stats["sum"], stats["number"])
            row["horizon"] = -1 / mean if mean else None
        elif gate != "rank" and "number" in stats:
            row[f"{gate}_mean"] = _ratio(stats["sum"], stats["number"])
    if "state" in found:
        norms = found["state"]
        row["state_norm"] = _ratio(norms["norms"], norms["sequences"], root=True)
    if "rank" in found:
        row["state_rank"] = _ratio(found["rank"]["sum"], found["rank"]["number"])
    if "load" in found:
        loads = [found["load"][key] for key in sorted(found["load"], key=int)]
        mean = sum(loads) / len(loads) or 1.0
        row["expert_load_max"], row["expert_load_min"] = max(loads) / mean, min(loads) / mean
        row["expert_loads"] = [load / mean for load in loads]
    return row | found.get("own", {})


def _ratio(total: float, number: float, *, root: bool = False) -> float | None:
    if not number:
        return None
    return math.sqrt(total / number) if root else total / number
