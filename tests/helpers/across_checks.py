"""Checks of what ops exchange between segments, run by across_worker.py in its processes."""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import torch
import torch.distributed as dist

from pretrain.data.sequences import Sequences, segment_of
from pretrain.ops import linear_attention
from pretrain.ops.across import carry, halo, multiply, scan
from pretrain.ops.over_heads import over_heads
from tests.helpers.relative_error import relative_error


@contextmanager
def counted():
    """Count the collectives that are begun while open."""
    found, kept = [], {name: getattr(dist, name) for name in ("all_gather", "all_to_all_single")}
    for name, collective in kept.items():

        def counting(*arguments, collective=collective, name=name, **options):
            found.append(name)
            return collective(*arguments, **options)

        setattr(dist, name, counting)
    try:
        yield found
    finally:
        for name, collective in kept.items():
            setattr(dist, name, collective)


def number_sent(case, lengths, group, rank, size, ring=False):
    """Return how many collectives forward and backward begin on a segment of a row."""
    generator = torch.Generator().manual_seed(1)
    pieces = segment_of(Sequences.from_lengths(lengths), rank, size, group, ring=ring)
    tensors = [x.requires_grad_() for x in case.tensors(generator, pieces.num_tokens)]
    with counted() as found:
        y, _ = case.run(
            tensors, case.parameters(generator), case.states(generator, pieces.count), pieces
        )
        y.sum().backward()
    return len(found)


def touched_by_the_first(case, lengths, group, rank, size):
    """Return the most that another sequence's output changes with the first one's tokens."""
    row = Sequences.from_lengths(lengths)
    pieces, length = segment_of(row, rank, size, group), row.num_tokens // size
    outputs = []
    for change in (0.0, 1.0):
        generator = torch.Generator().manual_seed(1)
        tensors = case.tensors(generator, row.num_tokens)
        local = []
        for x in tensors:
            steps = x.shape[1] // row.num_tokens
            x[:, : lengths[0] * steps] *= 1 + change
            local.append(x[:, rank * length * steps : (rank + 1) * length * steps])
        states = [x[: pieces.count] for x in case.states(generator, len(lengths) + size)]
        outputs.append(case.run(local, case.parameters(generator), states, pieces)[0])
    others = slice(max(lengths[0] - rank * length, 0), None)
    first, second = (y[:, others] for y in outputs)
    assert rank * length >= lengths[0] or not torch.equal(*outputs)
    return float((first - second).abs().max()) if first.numel() else 0.0


def check_halo(lengths, group, rank, size):
    """Compare rows before a segment, and their gradients, with those of the row."""
    row, worst = Sequences.from_lengths(lengths), 0.0
    pieces, length = segment_of(row, rank, size, group), row.num_tokens // size
    generator = torch.Generator().manual_seed(2)
    whole = torch.randn(row.num_tokens, 3, generator=generator, dtype=torch.float64)
    starts = [0, *itertools.accumulate(lengths)]
    for count in (1, 5, 60, 150):
        expected = torch.zeros_like(whole)
        weight = torch.randn(size, 150, 3, generator=generator, dtype=torch.float64)
        for other in range(size):
            border = other * length
            begun = max(start for start in starts if start <= border)
            reach = min(count, border - begun)
            expected[border - reach : border] += weight[other, :reach]
            if other == rank:
                wanted = whole[border - reach : border]
        rows = whole[rank * length : (rank + 1) * length].clone().requires_grad_()
        before, same = halo(pieces, rows, count)
        assert torch.equal(before, wanted) and torch.equal(same, rows)
        loss = (before * weight[rank, : len(before)]).sum() + 2 * same.sum()
        found = torch.autograd.grad(loss, rows)[0] - 2
        worst = max(worst, float((found - expected[rank * length :][:length]).abs().max()))
    return worst


def check_scan(lengths, group, rank, size):
    """Compare states that are scanned and their gradients with a chain, matrices and decays."""
    worst, heads, k, v = 0.0, 2, 3, 4
    pieces = segment_of(Sequences.from_lengths(lengths), rank, size, group)
    segment = pieces.segment
    assert segment is not None
    for shape in ((heads, k, k), (heads, k, 1), (heads, 1, 1)):
        generator = torch.Generator().manual_seed(3)

        def draw(*shape, generator=generator):
            return torch.randn(size, *shape, generator=generator, dtype=torch.float64)

        transitions, firsts, ends = draw(*shape), draw(*shape), draw(heads, k, v)
        reads, weight, into = draw(1, heads, k), draw(1, 1, heads, v), draw(heads, k, v)
        leaves = ends.clone().requires_grad_()
        state, loss, entered = torch.zeros_like(ends[0]), torch.tensor(0.0), []
        for other in range(size):
            state = state if segment.continues[other] else torch.zeros_like(state)
            entered.append(state)
            read = torch.einsum("thk,hkv->thv", reads[other], state)
            first = leaves[other] + multiply(firsts[other], state)
            loss = loss + (read * weight[other, 0]).sum() + (first * into[other]).sum()
            through = segment.through[other]
            state = leaves[other] + (multiply(transitions[other], state) if through else 0)
        loss.backward()
        start, gathered = scan(segment, transitions[rank], ends[rank])
        worst = max(worst, relative_error(start + 1, entered[rank] + 1))
        # As an op's: outputs and states are a function of this segment's ends alone.
        own = ends[rank].clone().requires_grad_()
        states = own[None] if segment.through[rank] else torch.stack([own, own])
        output = own.sum() * 0 + torch.zeros(1, 1, heads, v, dtype=torch.float64)
        output, states = carry(segment, output, states, reads[rank], gathered, firsts[rank])
        (output * weight[rank]).sum().add((states[0] * into[rank]).sum()).backward()
        worst = max(worst, relative_error(own.grad + 1, leaves.grad[rank] + 1))
    return worst


def check_heads(lengths, group, rank, size):
    """Compare a running sum over whole sequences with that of the row, for numbers of heads."""
    row, worst = Sequences.from_lengths(lengths), 0.0
    pieces, length = segment_of(row, rank, size, group), row.num_tokens // size
    for heads, shared in ((1, 1), (2, 1), (6, 3), (7, 7), (3, 1)):
        generator = torch.Generator().manual_seed(4)
        x, y, weight = (
            torch.randn(1, row.num_tokens, n, 2, generator=generator, dtype=torch.float64)
            for n in (heads, shared, heads)
        )
        y = y.float()  # dtypes may differ

        def sums(tensors, states, sequences, here):
            a, b = tensors
            b = b.repeat_interleave(a.shape[2] // b.shape[2], 2)
            parts = (a * b).split(sequences.lengths, 1)
            sums = torch.cat([part.cumsum(1) for part in parts], 1)
            return sums, [(torch.cat([part.sum(1) for part in parts]), [1] * sequences.count)]

        whole = [t.clone().requires_grad_() for t in (x, y)]
        expected, _ = sums(whole, [], row, slice(0, heads))
        gradients = torch.autograd.grad((expected * weight).sum(), whole)
        here = slice(rank * length, (rank + 1) * length)
        local = [t[:, here].clone().requires_grad_() for t in (x, y)]
        found, (ends,) = over_heads(pieces, sums, local, heads)
        assert ends.shape == (pieces.count, heads, 2)
        found_gradients = torch.autograd.grad((found * weight[:, here]).sum(), local)
        pairs = [(found, expected[:, here])]
        pairs += [(a, b[:, here]) for a, b in zip(found_gradients, gradients, strict=True)]
        scales = (1, 1, 1e-4)  # one of them is in float32
        errors = [relative_error(a, b) * s for (a, b), s in zip(pairs, scales, strict=True)]
        worst = max(worst, *errors)
    return worst


def check_constants(lengths, group, rank, size):
    """Compare gradients where one rank's message has none, and another's does not use its own.

    A rank that did not enter the exchange's backward pass would leave the others waiting.
    """
    row, worst = Sequences.from_lengths(lengths), 0.0
    pieces, length = segment_of(row, rank, size, group), row.num_tokens // size
    here, constant, unused = slice(rank * length, (rank + 1) * length), 0, size - 1
    generator = torch.Generator().manual_seed(6)
    shape = (row.num_tokens, 2, 3)
    x, weight = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    fixed = torch.zeros(row.num_tokens, dtype=torch.bool)
    fixed[length // 2 : (constant + 1) * length] = True  # of the end of a segment

    def part(rows):
        return torch.where(fixed[here, None, None], rows.detach(), rows)

    def sums(tensors, states, sequences, heads):
        parts = tensors[0].split(sequences.lengths, 1)
        return torch.cat([part.cumsum(1) for part in parts], 1), []

    # Of sums over heads, whose other operand is a constant on one rank.
    rows = x[here].clone().requires_grad_()
    total, _ = over_heads(pieces, sums, [part(rows)[None]], 2)
    loss = rows.sum() * 0 + ((total[0] * weight[here]).sum() if rank != unused else 0 * total.sum())
    (found,) = torch.autograd.grad(loss, rows)
    whole = x.clone().requires_grad_()
    total, _ = sums([torch.where(fixed[:, None, None], x, whole)[None]], [], row, None)
    used = slice(0, unused * length)
    (expected,) = torch.autograd.grad((total[0] * weight)[used].sum(), whole)
    worst = max(worst, float((found - expected[here]).abs().max()))

    # Of the rows before a segment, by their number, as one segment's weights have it.
    count = length // 4
    rows = x[here].clone().requires_grad_()
    before, same = halo(pieces, part(rows), count)
    used_here = (before * weight[here][: len(before)]).sum() if rank != unused else 0
    (found,) = torch.autograd.grad(used_here + 2 * same.sum(), rows)
    expected = torch.full_like(x, 2.0)
    for other in range(1, size - 1):
        border = other * length
        assert pieces.segment is not None
        reach = min(count, pieces.segment.continues[other] * length)
        starts = [s for s in itertools.accumulate([0, *lengths]) if s <= border]
        reach = min(reach, border - max(starts))
        expected[border - reach : border] += weight[border : border + reach]
    expected[fixed] = 0
    return max(worst, float((found - expected[here]).abs().max()))


def check_long_sums(group, rank, size, total=131_072):
    """Return the error of float32 states after many tokens with decays near 1, by float64's."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, total, 1, 4, generator=generator) for _ in range(3))
    decay = -1e-3 * torch.rand(1, total, 1, generator=generator)
    wide = [x.double() for x in (q, k, v)]
    _, exact = linear_attention(*wide, log_decay=decay.double())
    pieces = segment_of(Sequences.from_lengths([total]), rank, size, group)
    here = slice(rank * total // size, (rank + 1) * total // size)
    q, k, v, decay = (x[:, here] for x in (q, k, v, decay))
    _, found = linear_attention(q, k, v, log_decay=decay, sequences=pieces)
    return relative_error(found.double(), exact) if rank == size - 1 else 0.0
