"""M2RNN: a non-linear recurrence over a matrix state (arXiv 2603.14360).

    Z_t = tanh(H_{t-1} W + k_t^T v_t);    H_t = f_t H_{t-1} + (1 - f_t) Z_t;    y_t = q_t H_t

W multiplies on the right; the rows of H (key channels) never meet except in the read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.across import crossing
from pretrain.ops.m2rnn.checkpointed import CheckpointedM2RNN
from pretrain.ops.m2rnn.definition import recurrent_m2rnn
from pretrain.ops.over_heads import Ends, over_heads
from pretrain.ops.shared.arguments import (
    check_heads,
    check_numba,
    check_shapes,
    check_triton,
    choose_backend,
    numba_fits,
    resolve_sequences,
    resolve_state,
    triton_fits,
)
from pretrain.ops.shared.autocast import without_autocast
from pretrain.ops.shared.checkpointed_recurrence import checkpointed_recurrence

BACKENDS = ("auto", "recurrent", "checkpointed", "compiled", "triton")


@without_autocast
def m2rnn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    forget: Tensor,
    *,
    state_grad_clip: float | None = None,
    initial_state: Tensor | None = None,
    sequences: Sequences | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    checkpoint_every: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run M2RNN over sequences.

    q ``[B, T, Hq, K]``, k ``[B, T, Hk, K]``, v ``[B, T, H, V]``, weight ``[H, V, V]``, forget
    ``[B, T, H]`` in (0, 1). Hq and Hk divide H; each of their heads serves consecutive ones of H.

    ``state_grad_clip`` bounds every element of the gradient carried from one step back to the step
    before (not the part that enters through y), as in the published runs. With ``sequences``
    (or their tensor ``cu_seqlens`` ``[N + 1]``) B must be 1 and N sequences are packed;
    ``initial_state`` is ``[N, H, K, V]``.

    backend: ``recurrent`` is the definition, a plain loop through autograd; ``checkpointed`` the
    same loop with an explicit backward pass, which keeps only the state of every
    ``checkpoint_every``-th step; ``compiled`` the same in loops that numba compiles for the CPU;
    ``triton`` the same in one kernel each way, q, k, v of one dtype, ``checkpoint_every`` a
    multiple of 4 (64 by default). ``auto`` takes ``triton`` on CUDA for V of at most 512 (float32:
    256), ``compiled`` on CPUs where numba is installed and ``checkpointed`` elsewhere; on chip is W
    of up to 128 (float32: 64).

    Returns y ``[B, T, H, V]`` in v's dtype and the final state, float32 or wider.
    Raises ValueError for shapes that do not fit and for an unknown backend.
    """
    widest = 1024 // v.element_size()  # of wider heads products by all of the card are faster
    on_chip = triton_fits(v, 100 * 1024) and v.shape[-1] <= widest
    fast = "triton" if on_chip else "compiled" if numba_fits(v) else "checkpointed"
    backend = choose_backend("m2rnn", backend, BACKENDS, "recurrent", fast)
    check_heads("m2rnn", q, v)
    check_heads("m2rnn", k, v, "k")
    batch_size, length, num_heads, value_dim = v.shape
    key_dim = q.shape[-1]
    check_shapes(
        "m2rnn",
        {
            "q": (q, (batch_size, length, q.shape[2], key_dim)),
            "k": (k, (batch_size, length, k.shape[2], key_dim)),
            "weight": (weight, (num_heads, value_dim, value_dim)),
            "forget": (forget, (batch_size, length, num_heads)),
        },
    )
    for name, shared in (("q", q), ("k", k)):
        if num_heads % shared.shape[2]:
            raise ValueError(
                f"m2rnn: {name} has {shared.shape[2]} heads, expected a divisor of v's {num_heads}"
            )
    if state_grad_clip is not None and state_grad_clip <= 0:
        raise ValueError(f"m2rnn: state_grad_clip is {state_grad_clip}, expected more than 0")
    sequences = resolve_sequences("m2rnn", batch_size, length, v.device, sequences, cu_seqlens)
    initial_state = resolve_state(
        "m2rnn",
        initial_state,
        (sequences.count, num_heads, key_dim, value_dim),
        v,
        "sequences, heads, key dim, value dim",
    )
    if crossing(sequences) is not None:
        run = partial(
            m2rnn,
            state_grad_clip=state_grad_clip,
            backend=backend,
            checkpoint_every=checkpoint_every,
        )

        def whole(
            tensors: Sequence[Tensor], begun: Sequence[Tensor], row: Sequences, heads: slice
        ) -> tuple[Tensor, Ends]:
            q, k, v, f = tensors
            y, end = run(q, k, v, weight[heads], f, initial_state=begun[0], sequences=row)
            return y, [(end, [1] * row.count)]

        y, (end,) = over_heads(sequences, whole, (q, k, v, forget), num_heads, [initial_state])
        return y, end
    if backend == "triton":
        check_triton("m2rnn", v)
        from pretrain.ops.m2rnn.kernels import CHUNK, M2RNN, PIECE

        chunk = CHUNK if checkpoint_every is None else checkpoint_every
        if chunk < 1 or chunk % PIECE:
            raise ValueError(
                f"m2rnn: checkpoint_every is {chunk}, expected a multiple of {PIECE} for triton"
            )
        output, state = M2RNN.apply(
            q.flatten(0, 1).to(v.dtype),
            k.flatten(0, 1).to(v.dtype),
            v.flatten(0, 1),
            weight,
            forget.flatten(0, 1),
            initial_state,
            sequences,
            state_grad_clip,
            chunk,
            torch.is_grad_enabled(),
        )
        return output.view(v.shape), state
    dtype = initial_state.dtype
    rows = [x.flatten(0, 1).to(dtype) for x in (q, k, v, forget)]
    weight = weight.to(dtype)
    if backend == "recurrent":
        output, state = recurrent_m2rnn(rows, weight, initial_state, sequences, state_grad_clip)
    elif backend == "compiled":
        check_numba("m2rnn", v)
        if checkpoint_every is not None and checkpoint_every < 1:
            raise ValueError(f"m2rnn: checkpoint_every is {checkpoint_every}, expected at least 1")
        from pretrain.ops.m2rnn.compiled import compiled_m2rnn

        output, state = compiled_m2rnn(
            rows, weight, initial_state, sequences, state_grad_clip, checkpoint_every
        )
    else:
        output, (transposed,) = checkpointed_recurrence(
            CheckpointedM2RNN(state_grad_clip),
            rows,
            [weight],
            [initial_state.mT.contiguous()],
            sequences,
            checkpoint_every,
        )
        state = transposed.mT.contiguous()
    return output.to(v.dtype).view(batch_size, length, num_heads, value_dim), state
