"""Linear recurrences without mixing of channels: HGRN, quasi-LSTM, S6, LRU.

    y_t = a_t y_{t-1} + x_t

elementwise, real or complex. Sources: HGRN arXiv 2311.04823, quasi-LSTM arXiv 2309.11197, S6 arXiv
2312.00752, LRU arXiv 2303.06349.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from pretrain.data.sequences import Sequences, pieces_alone
from pretrain.ops.across import crossing
from pretrain.ops.diagonal_scan.definition import sequential_diagonal_scan
from pretrain.ops.diagonal_scan.segmented import segmented_diagonal_scan
from pretrain.ops.diagonal_scan.tiled import tiled_diagonal_scan
from pretrain.ops.shared.arguments import (
    check_shapes,
    choose_backend,
    resolve_sequences,
    resolve_state,
)
from pretrain.ops.shared.autocast import without_autocast
from pretrain.ops.shared.flash_linear_attention import check_fla_scan, fla_diagonal_scan

BACKENDS = ("auto", "sequential", "tiled", "fla")


@without_autocast
def diagonal_scan(
    a: Tensor | None,
    x: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    log_decay: Tensor | None = None,
    sequences: Sequences | Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute ``y_t = a_t y_{t-1} + x_t`` elementwise, from ``initial_state`` or zeros.

    a, x: ``[B, T, D]``, both real or both complex; a may be 0. In place of a, which is then None,
    ``log_decay`` may be given, of which it is the exponential. With ``sequences`` (or their tensor
    ``cu_seqlens`` ``[N + 1]``) B must be 1 and N sequences are packed along T; ``initial_state``
    is then ``[N, D]``, otherwise ``[B, D]``.

    backend: ``sequential`` is the definition, a plain loop; ``tiled`` runs chunks of time side by
    side; ``fla`` is flash-linear-attention's kernel for CUDA, which steps from token to token and
    takes a real ``log_decay``. ``auto`` is ``tiled``, or ``sequential`` where every sequence is a
    single token.

    Returns y ``[B, T, D]`` in x's dtype and the final state, float32, complex64 or wider. Raises
    ValueError for shapes and dtypes that do not fit, and for an unknown backend.
    """
    op = "diagonal_scan"
    if x.ndim != 3:
        raise ValueError(f"{op}: x is {tuple(x.shape)}, expected [B, T, D]")
    given = [decay for decay in (a, log_decay) if decay is not None]
    if len(given) != 1:
        found = "both given" if given else "both None"
        raise ValueError(f"{op}: a and log_decay are {found}, expected one of them")
    check_shapes(op, {"a": (a, x.shape), "log_decay": (log_decay, x.shape)})
    batch_size, length, dim = x.shape
    sequences = resolve_sequences(op, batch_size, length, x.device, sequences, cu_seqlens)
    others = {"a": a, "log_decay": log_decay, "initial_state": initial_state}
    for name, tensor in others.items():
        if tensor is not None and tensor.is_complex() != x.is_complex():
            raise ValueError(
                f"{op}: {name} is {tensor.dtype} and x {x.dtype}, expected both real or complex"
            )
    state = resolve_state(op, initial_state, (sequences.count, dim), x, "sequences, channels")
    fast = "tiled" if sequences.max_length > 1 else "sequential"
    backend = choose_backend(op, backend, BACKENDS, "sequential", fast)
    rows, decay = x.flatten(0, 1).to(state.dtype), given[0].flatten(0, 1).to(state.dtype)
    segment = crossing(sequences)
    pieces = sequences if segment is None else pieces_alone(sequences)
    if backend == "fla":
        check_fla_scan(op, log_decay, rows)
        run = partial(fla_diagonal_scan, decay, rows, sequences=pieces)
    if log_decay is not None:
        decay = decay.exp()
    if backend != "fla":
        form = sequential_diagonal_scan if backend == "sequential" else tiled_diagonal_scan
        run = partial(form, decay, rows, sequences=pieces)
    if segment is None:
        output, state = run(state)
    else:
        output, state = segmented_diagonal_scan(run, decay, rows, state, sequences, segment)
    return output.to(x.dtype).view(batch_size, length, dim), state
