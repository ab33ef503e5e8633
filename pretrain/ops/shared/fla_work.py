"""The work of flash-linear-attention's kernels, for plans, and what stands for them there.

Bytes and FLOPs are counted from its chunked algorithms with chunks of 64 tokens, per token and
head of K key and V value channels; benchmarks/planner_fit.py holds their times against published
ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.shared.planning import Work, WorkKind, nbytes, stand_in

CHUNK = 64  # tokens
HOST = (450.0, 650.0)  # microseconds of Python of a call, forward and backward
STEP = 1.5  # microseconds from one chunk's state to the next

# (bytes, FLOPs) of a token and head, forward and backward
Counts = tuple[tuple[float, float], tuple[float, float]]


def delta_rule_counts(key_dim: int, value_dim: int, *, per_channel: bool = False) -> Counts:
    """Return the counts of a sub-step of the (gated) delta rule; ``per_channel``: of KDA."""
    k, v, c = key_dim, value_dim, CHUNK
    gates = (32.0 * k, 60.0 * k) if per_channel else (0.0, 0.0)
    return (
        (2 * (6 * k + 6 * v + c) + 4 * k * v / c + gates[0], 6 * k * v + 2 * c * (3 * k + 2 * v)),
        (
            2 * (16 * k + 16 * v + 2 * c) + 8 * k * v / c + gates[1],
            16 * k * v + 2 * c * (10 * k + 8 * v),
        ),
    )


def linear_attention_counts(
    key_dim: int, value_dim: int, *, per_channel: bool = False, sharing: int = 1
) -> Counts:
    """Return the counts of linear attention (RetNet, Mamba-2); ``per_channel``: of GLA.

    ``sharing``: heads that read, and sum the gradients of, the same keys and queries.
    """
    k, v, c = key_dim, value_dim, CHUNK
    flops = (4 * k * v + 2 * c * (k + v), 10 * k * v + 2 * c * (4 * k + 3 * v))
    if per_channel:
        moved = 28 * k + 8 * v + 8 * k * v / c + 8 * c
        return (moved, flops[0]), (3.3 * moved, flops[1])
    return (
        (2 * (3 * k / sharing + 4 * v) + 8 * k * v / c, flops[0]),
        (2 * (10 * k / sharing + 8 * v) + 16 * k * v / c, flops[1]),
    )


def low_rank_counts(kernel: str, key_dim: int, value_dim: int) -> Counts:
    """Return the counts of a kernel of :mod:`pretrain.ops.shared.fla_low_rank`.

    Gated DeltaNet-2 adds gates to Kimi delta attention, and Comba a key to the gated delta rule.
    ``dplr`` writes four triangles of each chunk, and computes all but its output again before its
    gradients.
    """
    k, v, c = key_dim, value_dim, CHUNK
    if kernel != "dplr":
        (moved, flops), (moved_back, flops_back) = delta_rule_counts(
            k, v, per_channel=kernel == "gdn2"
        )
        more = 2 * (k + v) if kernel == "gdn2" else 2 * k
        return (moved + 2 * more, flops), (moved_back + 6 * more, flops_back)
    moved = 48 * k + 16 * v + 28 * c + 4 * k * v / c
    flops = 8 * k * v + 2 * c * (5 * k + 4 * v)
    back = 22 * k * v + 2 * c * (14 * k + 9 * v)
    return (moved, flops), (3 * moved, back)


def mesa_counts(dim: int, iterations: int) -> Counts:
    """Return the counts of the mesa layer, whose kernels solve with a chunk's state on chip."""
    k, c = dim, CHUNK
    solve = iterations * (4.0 * c * k + 2 * k * k)
    states = 6.0 * k * k / c  # in float32, and in bfloat16
    return (
        (2 * 7 * k + 2 * states, solve + 6 * k * k + 4 * c * k),
        (2 * 24 * k + 4 * states, solve + 20 * k * k + 16 * c * k),
    )


def recurrence_work(
    kind: WorkKind, counts: Counts, times: float, longest: int
) -> tuple[tuple[Work, float], tuple[Work, float]]:
    """Return the (work, bytes) of both passes over ``times`` tokens and heads.

    ``longest``: tokens of the longest sequence, whose chunks' states wait for each other.
    """
    chain = STEP * longest / CHUNK
    passes = zip(counts, (chain, 2 * chain), HOST, strict=True)
    forward, backward = (
        (Work(flops * times, kind=kind, chain=steps, host=host), moved * times)
        for (moved, flops), steps, host in passes
    )
    return forward, backward


def planned_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor,
    sequences: Sequences | None,
    from_zeros: bool,
) -> tuple[Tensor, Tensor]:
    """Stand for fla's delta rule; it keeps its inputs and a triangle of each chunk."""
    steps, heads = k.shape[0] * k.shape[1], k.shape[2]
    per_channel = log_decay is not None and log_decay.ndim == 4
    counts = delta_rule_counts(k.shape[3], v.shape[3], per_channel=per_channel)
    longest = k.shape[1] if sequences is None else sequences.max_length
    forward, backward = recurrence_work("delta_rule", counts, steps * heads, longest)
    given = None if from_zeros else initial_state
    inputs = [x for x in (q, k, v, beta, log_decay, given) if x is not None]
    found = stand_in(
        inputs,
        lambda: (q.new_empty(*q.shape[:3], v.shape[3]), torch.empty_like(initial_state)),
        forward,
        backward,
        lambda: (k.new_empty(*k.shape[:3], CHUNK),),
    )
    return found[0], found[1]


def planned_low_rank(
    kernel: str,
    tensors: tuple[Tensor, ...],
    log_decay: Tensor,
    initial_state: Tensor,
    sequences: Sequences | None,
    from_zeros: bool,
) -> tuple[Tensor, Tensor]:
    """Stand for a kernel of :mod:`pretrain.ops.shared.fla_low_rank`, which keeps its inputs.

    ``tensors`` begin with q, k and v. All kernels but ``dplr`` keep triangles of each chunk too.
    """
    q, v = tensors[0], tensors[2]
    counts = low_rank_counts(kernel, q.shape[3], v.shape[3])
    longest = q.shape[1] if sequences is None else sequences.max_length
    forward, backward = recurrence_work("delta_rule", counts, q.shape[:3].numel(), longest)
    inputs = [*tensors, log_decay, *([] if from_zeros else [initial_state])]
    triangles = {"dplr": 0, "gdn2": 2, "comba": 1}[kernel]
    found = stand_in(
        inputs,
        lambda: (torch.empty_like(v), torch.empty_like(initial_state)),
        forward,
        backward,
        lambda: (q.new_empty(*q.shape[:3], triangles * CHUNK),),
    )
    return found[0], found[1]


def planned_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor,
    sequences: Sequences | None,
    from_zeros: bool,
) -> tuple[Tensor, Tensor]:
    """Stand for fla's linear attention; it keeps its inputs."""
    tokens, heads = q.shape[0] * q.shape[1], q.shape[2]
    per_channel = log_decay is not None and log_decay.ndim == 4
    sharing = heads if k.stride(2) == 0 else 1
    counts = linear_attention_counts(
        q.shape[3], v.shape[3], per_channel=per_channel, sharing=sharing
    )
    longest = q.shape[1] if sequences is None else sequences.max_length
    forward, backward = recurrence_work("linear_attention", counts, tokens * heads, longest)
    given = None if from_zeros else initial_state
    inputs = [x for x in (q, k, v, log_decay, given) if x is not None]
    found = stand_in(
        inputs,
        lambda: (torch.empty_like(v), torch.empty_like(initial_state)),
        forward,
        backward,
    )
    return found[0], found[1]


def planned_mesa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    ridge: Tensor,
    log_decay: Tensor,
    iterations: int,
    initial_state: tuple[Tensor, Tensor],
    sequences: Sequences | None,
    from_zeros: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Stand for fla's mesa layer; it keeps its inputs, and the solutions in float16."""
    times, longest = q.numel() // q.shape[3], q.shape[1]
    if sequences is not None:
        longest = sequences.max_length
    counts = mesa_counts(q.shape[3], iterations)
    forward, backward = recurrence_work("linear_attention", counts, times, longest)
    inputs = [q, k, v, beta, ridge, log_decay, *(() if from_zeros else initial_state)]
    found = stand_in(
        inputs,
        lambda: (torch.empty_like(v), *(torch.empty_like(x) for x in initial_state)),
        forward,
        backward,
        lambda: (torch.empty_like(q, dtype=torch.float16),),
    )
    return found[0], (found[1], found[2])


def planned_short_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Stand for fla's short convolution with its activation, which keeps its input."""
    inputs = [x, weight] if bias is None else [x, weight, bias]
    moved, work = nbytes([x]), Work(kind="elementwise", host=100.0)
    # Backward reads x and the output's gradient, and sums the weights' gradient in pieces.
    (y,) = stand_in(inputs, lambda: (torch.empty_like(x),), (work, 2 * moved), (work, 4 * moved))
    return y
