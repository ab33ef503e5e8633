"""The mesa layer (MesaNet, arXiv 2506.05233): ridge regression over the past for every token.

    Phi_t = a_t Phi_{t-1} + b_t k_t^T k_t;  Psi_t = a_t Psi_{t-1} + b_t k_t^T v_t
    o_t = q_t (Phi_t + Diag(ridge))^-1 Psi_t

Psi alone is what gated linear attention reads; the inverse makes the read the best linear map from
past keys to past values, as of this token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.across import crossing
from pretrain.ops.linear_attention.dispatch import linear_attention
from pretrain.ops.mesa.conjugate_gradients import Systems, solve, with_gradient
from pretrain.ops.mesa.definition import recurrent_mesa
from pretrain.ops.over_heads import Ends, over_heads
from pretrain.ops.shared.arguments import (
    check_heads,
    check_shapes,
    choose_backend,
    resolve_sequences,
    resolve_state,
)
from pretrain.ops.shared.autocast import without_autocast
from pretrain.ops.shared.flash_linear_attention import check_fla, fla_fits, fla_mesa

BACKENDS = ("auto", "recurrent", "conjugate_gradients", "fla")
FLA_WIDEST = 128  # channels of a key and of a value


@without_autocast
def mesa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    ridge: Tensor,
    *,
    log_decay: Tensor,
    iterations: int = 30,
    initial_state: tuple[Tensor, Tensor] | None = None,
    sequences: Sequences | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    chunk_size: int = 64,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Read, for every token, the ridge regression from the keys so far to the values so far.

    q, k: ``[B, T, H, K]``; v: ``[B, T, H, V]``; beta, in (0, 1), and log_decay, at most 0:
    ``[B, T, H]``; ridge, more than 0: ``[H, K]``. With ``sequences`` (or their tensor
    ``cu_seqlens`` ``[N + 1]``) B must be 1 and N sequences are packed along T. ``initial_state`` is
    (Phi ``[N, H, K, K]``, Psi ``[N, H, K, V]``), zeros by default.

    backend: ``recurrent`` is the definition, a loop with a direct solve for each token;
    ``conjugate_gradients`` solves all tokens' systems together, in float32 or wider, by so many
    ``iterations``, each of the cost of a linear attention, and once more in the backward pass;
    ``fla`` is flash-linear-attention's kernel of that (bfloat16 and float16; K = V), which ``auto``
    takes on CUDA where it can, and ``conjugate_gradients`` elsewhere.

    Returns the output ``[B, T, H, V]`` in v's dtype and the last state, float32 or wider.
    Raises ValueError for shapes that do not fit and for an unknown backend.
    """
    check_heads("mesa", q, v)
    if min(chunk_size, iterations) < 1:
        raise ValueError(
            f"mesa: chunk_size is {chunk_size} and iterations {iterations}, expected at least 1"
        )
    batch_size, length, num_heads, key_dim = q.shape
    value_dim = v.shape[-1]
    check_shapes(
        "mesa",
        {
            "k": (k, q.shape),
            "v": (v, (*q.shape[:3], value_dim)),
            "beta": (beta, q.shape[:3]),
            "ridge": (ridge, (num_heads, key_dim)),
            "log_decay": (log_decay, q.shape[:3]),
        },
    )
    as_rows = sequences is None and cu_seqlens is None
    sequences = resolve_sequences("mesa", batch_size, length, q.device, sequences, cu_seqlens)
    given = (None, None) if initial_state is None else initial_state
    covariance, state = (
        resolve_state(
            "mesa",
            one,
            (sequences.count, num_heads, key_dim, width),
            q,
            f"sequences, heads, key dim, {axis} dim",
        )
        for one, width, axis in zip(given, (key_dim, value_dim), ("key", "value"), strict=True)
    )
    alike = value_dim == key_dim <= FLA_WIDEST
    fast = "conjugate_gradients"
    if alike and sequences.max_length > 1 and fla_fits(q, decay_per_head=True):
        fast = "fla"
    backend = choose_backend("mesa", backend, BACKENDS, "recurrent", fast)
    if crossing(sequences) is not None:
        run = partial(mesa, iterations=iterations, backend=backend, chunk_size=chunk_size)

        def whole(
            tensors: Sequence[Tensor], begun: Sequence[Tensor], row: Sequences, heads: slice
        ) -> tuple[Tensor, Ends]:
            q, k, v, beta, decay = tensors
            before = (begun[0], begun[1])
            output, ends = run(
                q, k, v, beta, ridge[heads], log_decay=decay, initial_state=before, sequences=row
            )
            return output, [(end, [1] * row.count) for end in ends]

        tensors = (q, k, v, beta, log_decay)
        output, ends = over_heads(sequences, whole, tensors, num_heads, [covariance, state])
        return output, (ends[0], ends[1])
    dtype = state.dtype
    if backend == "fla":
        check_fla("mesa", q)
        if not alike:
            raise ValueError(
                f"mesa: backend 'fla' takes keys and values of one width of at most {FLA_WIDEST}, "
                f"found {key_dim} and {value_dim}"
            )
        return fla_mesa(
            q,
            k.to(q.dtype),
            v.to(q.dtype),
            beta.to(dtype),
            ridge.to(dtype),
            log_decay.to(dtype),
            iterations,
            (covariance, state),
            None if as_rows else sequences,
            from_zeros=initial_state is None,
        )

    def wide(x: Tensor) -> Tensor:
        return x.flatten(0, 1).to(dtype)

    form: Callable[..., tuple[Tensor, tuple[Tensor, Tensor]]] = recurrent_mesa
    if backend != "recurrent":
        form = partial(_by_conjugate_gradients, chunk_size=chunk_size, iterations=iterations)
    output, found = form(
        wide(q),
        wide(k),
        wide(v),
        wide(beta),
        wide(log_decay),
        ridge.to(dtype),
        (covariance, state),
        sequences,
    )
    return output.to(v.dtype).view(batch_size, length, num_heads, value_dim), found


def _by_conjugate_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    ridge: Tensor,
    initial_state: tuple[Tensor, Tensor],
    sequences: Sequences,
    chunk_size: int,
    iterations: int,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Compute :func:`pretrain.ops.mesa.definition.recurrent_mesa` by iterations."""
    write, how = beta[..., None] * k, (sequences, chunk_size, iterations)
    made = (k, write, log_decay, ridge, initial_state[0])
    systems = Systems(*(x.detach() for x in made))
    solution = solve(systems, q, *how)

    def attend(reads: Tensor, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        output, last = linear_attention(
            reads[None],
            write[None],
            values[None],
            log_decay=log_decay[None],
            scale=1.0,
            initial_state=state,
            sequences=sequences,
            chunk_size=chunk_size,
        )
        return output[0], last

    image, covariance = attend(solution, k, initial_state[0])
    residual = q - image - ridge * solution
    solution = with_gradient(residual, solution, systems, *how)
    output, state = attend(solution, v, initial_state[1])
    return output, (covariance, state)
