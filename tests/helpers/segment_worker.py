"""Every mixer over the segments of a row, in real processes; see test_segments.py.

``python -m tests.helpers.segment_worker FILE [NAME ...]``, on four processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import random
import re
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.config import ParallelConfig
from pretrain.data.sequences import Sequences, segment_of
from pretrain.model.block import Block, run_block
from pretrain.model.build import build_model
from pretrain.nn.mixers import registry
from pretrain.nn.mixers.over_segments import beyond_segments
from pretrain.ops.chain import open_chain
from pretrain.parallel.processes import (
    context_group,
    gather,
    is_main_process,
    start_processes,
    stop_processes,
)
from pretrain.planner.messages import bytes_sent, group_of
from pretrain.planner.units import busiest_segment
from tests.helpers.small_mixers import SMALL
from tests.helpers.tensor_parallel_worker import settings

TOKENS = 48
# Rows long enough for cells to forget, as usual, what enters a segment.
LONG = {"para_gru": 512, "para_lstm": 512}
# One document; four, crossing; starting at borders; as short as one token; a long tail.
LAYOUTS = {
    "one": [48],
    "crossing": [5, 22, 11, 10],
    "at borders": [12, 3, 21, 12],
    "short": [1, 2, 9, 1, 1, 10, 1, 11, 12],
    "long tail": [5, 43],
}
STATES = ("states", "by state")  # modes that look at states too
Errors = dict[str, tuple[float, str]]  # by case: how large, and of what


def random_lengths(name: str) -> list[int]:
    """Lengths that add up to the row, drawn for a mixer."""
    draw = random.Random(name)
    cuts = sorted(draw.sample(range(1, TOKENS), draw.randint(1, 6)))
    return [b - a for a, b in itertools.pairwise([0, *cuts, TOKENS])]


def block_of(name: str, values: dict[str, object], dtype: torch.dtype = torch.float64) -> Block:
    model = build_model(settings(name, {name: values}), 16, seed=0, dtype=dtype)
    block = model.blocks[0]
    assert isinstance(block, Block)
    return block


def over_heads(block: Block) -> Block:
    """Let a block's cell be computed with some of the heads on each process."""
    parallel = dataclasses.replace(block.mixer.parallel, context_cells="heads")
    block.mixer.parallel = parallel
    assert beyond_segments(block.mixer)
    return block


def ended(sequences: Sequences) -> int:
    """How many of a segment's sequences end in it, the first ones."""
    segment = sequences.segment
    if segment is None:
        return sequences.count
    following = segment.rank + 1
    return sequences.count - (following < segment.size and segment.continues[following])


def run(block, x, sequences, weights, with_states, checkpointing="none"):
    """Output, final states, and the gradients of x and of all parameters."""
    block.zero_grad()
    x, states = x.clone().requires_grad_(), []
    if with_states:
        y, state = block(x, sequences=sequences)
        chosen = [torch.tensor([number]) for number in range(ended(sequences))]
        states = [block.mixer.select_state(state, number) for number in chosen]
    else:
        y, _ = run_block(block, x, sequences, 0, None, checkpointing)
    loss = (y * weights).sum()
    for tensor in (tensor for state in states for tensor in state.values()):
        if tensor.is_floating_point():
            loss = loss + tensor.sin().sum()
    loss.backward()
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in block.named_parameters()
    }
    states = [{name: tensor.detach() for name, tensor in state.items()} for state in states]
    return y.detach(), states, x.grad, grads


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    if not b.numel():
        return 0.0
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp_min(1e-300))


@contextlib.contextmanager
def by_its_state(mixer):
    """Hand a mixer's state from segment to segment, though its ops know segments."""
    mixer.over_time = "state"
    try:
        yield
    finally:
        del mixer.over_time


def shared_out(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Return what the jobs give, each done by one rank and sent to the others."""
    size = dist.get_world_size()
    found = gather([job() for job in jobs[dist.get_rank() :: size]])
    return [found[number % size][number // size] for number in range(len(jobs))]


def compare(
    block: Block, lengths: list[int], groups: list[Any], modes: list[str], turn: int = 0
) -> Errors:
    """The largest relative differences of this rank's segments from the whole row's.

    Of two pairs of ranks, each has every second case of segments of half a row.
    """
    generator = torch.Generator().manual_seed(1)
    x, weights = torch.randn(2, TOKENS, 1, 24, generator=generator, dtype=torch.float64)
    row = Sequences.from_lengths(lengths)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    needed = sorted({mode in STATES for mode in modes})
    rows = shared_out([partial(run, block, x, row, weights, kind) for kind in needed])
    references = dict(zip(needed, rows, strict=True))
    errors: Errors = {}
    for group, (number, mode) in itertools.product(groups, enumerate(modes)):
        rank, size = group.rank(), group.size()
        if mode == "ring" and size == 2:
            continue  # as all others are
        if size == 2 and (number + turn) % 2 != dist.get_rank() // 2:
            continue
        length = TOKENS // size
        own = slice(rank * length, (rank + 1) * length)
        # On two ranks states go in a ring, as they do in training.
        pieces = segment_of(row, rank, size, group, ring=size == 2 or mode == "ring")
        with_states = mode in STATES
        y, states, d_x, grads = references[with_states]
        with by_its_state(block.mixer) if mode == "by state" else contextlib.nullcontext():
            checkpointing = "block" if mode == "ring" else mode
            found = run(block, x[own], pieces, weights[own], with_states, checkpointing)
        pairs = {"output": (found[0], y[own]), "input's gradient": (found[2], d_x[own])}
        for name, gradient in found[3].items():
            dist.all_reduce(gradient, group=group)
            pairs[f"gradient of {name}"] = gradient, grads[name]
        mine = [s for s, end in zip(states, ends, strict=False) if own.start < end <= own.stop]
        for one, other in zip(found[1], mine, strict=True):
            for name in one:
                pairs[f"{name} after {len(pairs)}"] = one[name].double(), other[name].double()
        differences = {what: difference(*pair) for what, pair in pairs.items()}
        worst = max(differences, key=differences.__getitem__)
        errors[f"{size}, {mode}"] = (differences[worst], f"{worst} on rank {rank}")
    return errors


def compare_frozen(groups: list[Any]) -> Errors:
    """Errors of the gradients behind two blocks that do not train, of an input without a gradient.

    Both ways of looking beyond a segment are among them, scans by gathering and in a ring; two
    steps of each, for a message that nobody waits for is found by the next one.
    """
    names = ("mlstm", "gdn", "mlstm", "gdn")
    blocks = [block_of(name, SMALL[name][0]) for name in names]
    for block in blocks[:2]:
        block.requires_grad_(False)
    trained = [p for block in blocks[2:] for p in block.parameters()]

    def gradients(x, sequences, weights):
        for block in blocks:
            x, _ = run_block(block, x, sequences, 0, None)
        (x * weights).sum().backward()
        found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained]
        for p in trained:
            p.grad = None
        return found

    errors: Errors = {}
    generator = torch.Generator().manual_seed(2)
    rings = (False, False, True, True)
    for group, (layout, lengths), ring in itertools.product(groups, LAYOUTS.items(), rings):
        x, weights = torch.randn(2, TOKENS, 1, 24, generator=generator, dtype=torch.float64)
        row, length = Sequences.from_lengths(lengths), TOKENS // group.size()
        own = slice(group.rank() * length, (group.rank() + 1) * length)
        expected = gradients(x, row, weights)
        pieces = segment_of(row, group.rank(), group.size(), group, ring=ring)
        found = gradients(x[own], pieces, weights[own])
        for gradient in found:
            dist.all_reduce(gradient, group=group)
        worst = max(map(difference, found, expected))
        key = f"frozen, {layout}, {group.size()}"
        errors[key] = (max(worst, errors.get(key, (0.0, ""))[0]), f"rank {group.rank()}")
    return errors


class _Sent(TorchDispatchMode):
    """Count the bytes that this process sends."""

    total = 0.0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        group = group_of(args) if function.namespace == "c10d" else None
        if group is not None:
            self.total += bytes_sent(function.__name__, args, group)
        return function(*args, **(kwargs or {}))


def sent_bytes(
    block: Block, groups: list[Any], tokens: int = TOKENS, ring: bool = False
) -> dict[str, float]:
    """The bytes that this rank sends in float32, both ways, by the number of processes."""
    row, found = Sequences.from_lengths([tokens]), {}
    for group in groups:
        in_ring = ring or group.size() == 2
        pieces = segment_of(row, group.rank(), group.size(), group, ring=in_ring)
        x = torch.ones(pieces.num_tokens, 1, 24, requires_grad=True)
        with _Sent() as sent:
            y, _ = run_block(block, x, pieces, 0, None)
            y.sum().backward()
        found[str(group.size())] = sent.total
    return found


def add_example_layer() -> str:
    """Register the layer that docs/add-a-layer.md writes; return its name."""
    page = (Path(__file__).parents[2] / "docs/add-a-layer.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    module = types.ModuleType("example_layer")
    sys.modules[module.__name__] = module  # where its annotations are looked up
    before = set(registry())
    exec(compile(code, "docs/add-a-layer.md", "exec"), module.__dict__)
    (name,) = set(registry()) - before
    return name


def main(file: Path, wanted: list[str]) -> None:
    add_example_layer()
    start_processes(ParallelConfig(context=4))
    groups = [context_group(), dist.new_subgroups(2)[0]]
    open_chain(groups[1], datetime.timedelta(minutes=2))
    found: dict[str, tuple[float, str]] = compare_frozen(groups)
    sent: dict[str, dict[str, float]] = {}
    for place, name in enumerate(wanted or sorted(registry())):
        for number, values in enumerate(SMALL.get(name, [{}])):
            if number == 0:
                single = block_of(name, values, torch.float32)
                long = LONG.get(name, TOKENS)
                sent[name] = sent_bytes(single, groups, long)
                sent[f"{name} ring"] = sent_bytes(single, groups[:1], long, ring=True)
            block = block_of(name, values)
            for turn, (layout, lengths) in enumerate(LAYOUTS.items(), place):
                modes = ["states"]
                if number == 0:  # the kinds of checkpointing in turn
                    modes.append(("block", "selective")[turn % 2])
                if block.mixer.over_time == "ops" and number == 0:
                    modes.append("by state")
                    if layout in ("one", "crossing"):
                        modes.append("ring")
                for key, error in compare(block, lengths, groups, modes, turn).items():
                    found[f"{name} {number}, {layout}, {key}"] = error
            if number == 0:
                for key, error in compare(
                    block, random_lengths(name), groups, ["states"], place
                ).items():
                    found[f"{name} {number}, random, {key}"] = error
        if registry()[name].over_time == "cells":
            single, block = (
                over_heads(block_of(name, {"num_heads": 4}, dtype))
                for dtype in (torch.float32, torch.float64)
            )
            sent[f"{name} over heads"] = sent_bytes(single, groups)
            for turn, (layout, lengths) in enumerate(LAYOUTS.items(), place):
                modes = ["states", ("block", "selective")[turn % 2]]
                for key, error in compare(block, lengths, groups, modes, turn).items():
                    found[f"{name} over heads, {layout}, {key}"] = error
    everyone = gather((found, sent))
    if is_main_process():
        errors: list[Errors] = [each for each, _ in everyone]
        keys = dict.fromkeys(key for each in errors for key in each)
        worst = {key: max(each[key] for each in errors if key in each) for key in keys}
        own = {str(size): busiest_segment(1, size) for size in (2, 4)}
        planned = {
            key: {size: everyone[own[size]][1][key][size] for size in sizes}
            for key, sizes in sent.items()
        }
        file.write_text(json.dumps({"errors": worst, "sent": planned}))
    stop_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
