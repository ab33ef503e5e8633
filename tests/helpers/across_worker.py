"""Runs ops on segments of rows, on 2 and on 4 processes, against the whole row on one.

``torchrun --nproc-per-node 4 -m tests.helpers.across_worker [NAME ...]`` writes one line of JSON:
for each case the largest relative error of any rank, in its output, final states and gradients.
"""

from __future__ import annotations

import itertools
import json
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pretrain.data.sequences import Sequences, segment_of
from pretrain.ops.chain import open_chain
from tests.helpers.across_cases import CASES
from tests.helpers.across_checks import (
    check_constants,
    check_halo,
    check_heads,
    check_long_sums,
    check_scan,
    number_sent,
    touched_by_the_first,
)

TOKENS = 192
LAYOUTS = {
    "one": [192],
    "four": [10, 90, 50, 42],
    "at borders": [48, 12, 84, 48],
    "short": [3, 6, 38, 2, 1, 45, 2, 46, 49],
    "long tail": [5, 187],
}


# Sequences without tokens, at borders and beside each other, and segments that have no start.
EMPTY = [0, 48, 0, 0, 100, 0, 44, 0]


def random_lengths(seed):
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randperm(TOKENS - 1, generator=generator)[: 2 + seed % 5].sort().values + 1
    return [b - a for a, b in itertools.pairwise([0, *cuts.tolist(), TOKENS])]


LAYOUTS |= {f"random {seed}": random_lengths(seed) for seed in range(2)}


def error(found, expected):
    if not expected.numel():
        return 0.0 if found.shape == expected.shape else float("inf")
    worst = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    return float(worst.detach().nan_to_num(nan=float("inf")))


# Cases whose states also go from rank to rank, and the layouts that they do so in.
RING = {
    "linear_attention 0 channel 0.3 True 6",
    "delta_rule 1 head 0.3 True 6",
    "delta_rule 2 channel 0.3 False 6",
    "delta_rule 1 channel 0.3 True 6 recurrent",
    "diagonal_scan torch.complex128 True",
}
RING_LAYOUTS = ("one", "four", "short")


def whole_row(case, lengths):
    """Return what a case gives of a row and is compared with, and the weights of its loss."""
    generator = torch.Generator().manual_seed(sum(map(ord, case.name)) + len(lengths))
    given = (
        case.tensors(generator, TOKENS),
        case.parameters(generator),
        case.states(generator, len(lengths)),
    )
    whole = [[x.clone().requires_grad_() for x in kind] for kind in given]
    y, finals = case.run(*whole, Sequences.from_lengths(lengths))
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (y, *finals)]
    loss = sum((x * w).sum() for x, w in zip((y, *finals), weights, strict=True))
    gradients = torch.autograd.grad(loss, [x for kind in whole for x in kind])
    return given, y.detach(), [x.detach() for x in finals], weights, gradients


def shared_out(case, names):
    """Return every whole row by its layout, each computed by one rank and sent to the others."""
    size = dist.get_world_size()
    everyone: list[Any] = [None] * size
    own = [whole_row(case, LAYOUTS[name]) for name in names[dist.get_rank() :: size]]
    dist.all_gather_object(everyone, own)
    return {name: everyone[number % size][number // size] for number, name in enumerate(names)}


def compare(case, lengths, expected_row, group, rank, size, ring=False):
    """Return the largest error of this rank's part of the row."""
    (tensors, parameters, states), y, finals, (weight, *weights), expected = expected_row
    pieces = segment_of(Sequences.from_lengths(lengths), rank, size, group, ring=ring)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    length = TOKENS // size
    begins = [i for i in range(len(lengths)) if rank * length <= ends[i] < (rank + 1) * length]
    stops = [i for i in range(len(lengths)) if rank * length < ends[i + 1] <= (rank + 1) * length]
    assert pieces.segment is not None
    entered = int(pieces.segment.continues[rank])
    left = rank + 1 < size and pieces.segment.continues[rank + 1]
    n, m = len(tensors), len(tensors) + len(parameters)

    def mine(x):
        steps = x.shape[1] // TOKENS
        return x[:, rank * length * steps : (rank + 1) * length * steps]

    def of_pieces(x):  # rubbish where a piece does not begin here: it must not be read
        return torch.cat([torch.full_like(x[:entered], 7.0), x[begins]])

    local = [mine(x) for x in tensors] + list(parameters) + [of_pieces(x) for x in states]
    local = [x.clone().requires_grad_() for x in local]
    y_here, finals_here = case.run(local[:n], local[n:m], local[m:], pieces)
    loss = (y_here * mine(weight)).sum()
    errors = [error(y_here, mine(y))]
    count = pieces.count - int(left)
    for x, found, w in zip(finals, finals_here, weights, strict=True):
        assert len(found) == pieces.count, "a final state for each piece"
        loss = loss + (found[:count] * w[stops]).sum()
        errors.append(error(found[:count], x[stops]))
    found = list(torch.autograd.grad(loss, local, allow_unused=True, materialize_grads=True))
    for x in found[n:m]:
        dist.all_reduce(x, group=group)
    errors += [error(a, mine(b)) for a, b in zip(found[:n], expected[:n], strict=True)]
    errors += [error(a, b) for a, b in zip(found[n:m], expected[n:m], strict=True)]
    errors += [error(a[entered:], b[begins]) for a, b in zip(found[m:], expected[m:], strict=True)]
    return max(errors)


# One sequence crosses several borders, and another begins where it ends.
CROSSING, APART = [100, 60, 32], [48] * 4


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    own, wanted = dist.get_rank(), sys.argv[1:]
    world = dist.group.WORLD
    assert world is not None
    for group in (pairs[own // 2], world):
        open_chain(group, timedelta(minutes=2))
    # Of segments of half a row each of two pairs has every second case.
    places = {2: (pairs[own // 2], own % 2, 2), 4: (world, own, 4)}
    found = {}

    def largest(name, size, errors):
        worst = torch.tensor(max(errors, default=-1.0), dtype=torch.float64)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        found[f"{name} on {size}"] = float(worst)

    def here(size, given):
        return list(given)[own // 2 :: 2] if size == 2 else given

    for number, case in enumerate(CASES if wanted != ["long"] else ()):
        if wanted and not case.name.startswith(tuple(wanted)):
            continue
        names = list(case.layouts or LAYOUTS)
        in_ring = RING_LAYOUTS if case.name in RING else ()
        rows = shared_out(case, list(dict.fromkeys([*names, *in_ring])))
        for size, place in places.items():
            errors = [compare(case, LAYOUTS[n], rows[n], *place) for n in here(size, names)]
            largest(case.name, size, errors)
            if in_ring:
                ring = here(size, in_ring)
                errors = [compare(case, LAYOUTS[n], rows[n], *place, ring=True) for n in ring]
                largest(f"{case.name}: ring", size, errors)
                gathers = float(number_sent(case, CROSSING, *place, ring=True))
                largest(f"{case.name}: ring gathers", size, [gathers])
            if size == 2 and number % 2 != own // 2:
                touched, sent, apart = [], [], []
            else:
                touched = [touched_by_the_first(case, CROSSING, *place)]
                sent, apart = (
                    [float(number_sent(case, lengths, *place))] for lengths in (CROSSING, APART)
                )
            largest(f"{case.name}: touched", size, touched)
            largest(f"{case.name}: sent", size, sent)
            largest(f"{case.name}: sent apart", size, apart)
    for size, place in places.items():
        if wanted == ["long"]:
            largest("long sums", size, [check_long_sums(*place)])
        checks = check_halo, check_scan, check_heads, check_constants
        for check in checks if wanted in ([], ["checks"]) else ():
            layouts = here(size, [*LAYOUTS.values(), EMPTY, EMPTY])  # of two pairs each has one
            errors = [check(lengths, *place) for lengths in layouts]
            largest(check.__name__, size, errors)
    if own == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
