"""Causal softmax attention over packed sequences, with grouped heads and a sliding window."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from typing import Any

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences, given_sequences
from pretrain.ops.across import crossing
from pretrain.ops.attention.definition import explicit_attention
from pretrain.ops.attention.logits import largest_logit
from pretrain.ops.attention.segmented import segmented_attention
from pretrain.ops.shared.arguments import choose_backend, resolve_sequences
from pretrain.ops.shared.planning import (
    is_planned,
    planned_attention,
    scaled_dot_product_attention,
)
from pretrain.ops.shared.watching import Watch

BACKENDS = ("auto", "explicit", "sdpa", "varlen", "flash")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    sequences: Sequences | Tensor | None = None,
    sequences_k: Sequences | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str = "auto",
    watch: Watch | None = None,
) -> Tensor:
    """Attend causally from q ``[B, T, H, D]`` to k, v ``[B, S, Hkv, D]``, H a multiple of Hkv.

    The output is shaped as q. The queries of a sequence are its last ones: query t of T sees keys
    up to S - T + t, and with ``window`` only the last ``window`` of those. ``sequences`` packs N
    sequences in a batch of 1, ``sequences_k`` says where their keys lie when there are more keys
    than queries; ``cu_seqlens`` and ``cu_seqlens_k`` ``[N + 1]`` are the same as tensors.

    backend: ``explicit`` is the definition, every weight written out; ``sdpa`` (torch) anywhere; on
    CUDA in bf16 or fp16 ``flash`` (flash-attn: version 3 on Hopper where it is installed, else 2)
    and ``varlen`` (what torch itself has of it). ``auto`` takes the last that it can, but ``sdpa``
    for ``varlen`` where sequences are of one length and without a past or a window: it need not
    repeat the keys of grouped heads. ``watch`` is shown the largest of the ``logits`` that are
    computed here, which is half of the work of attention in float32. Raises ValueError for shapes
    that do not fit or a backend that this machine lacks.
    """
    asked, fast = backend, fast_attention(q)
    backend = choose_backend("attention", backend, BACKENDS, "explicit", fast)
    if q.shape[0] != k.shape[0] or k.shape != v.shape or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit"
        )
    queries = given_sequences("attention", sequences, cu_seqlens)
    keys = given_sequences("attention, of the keys", sequences_k, cu_seqlens_k)
    keys = queries if keys is None else keys
    queries = resolve_sequences("attention", q.shape[0], q.shape[1], q.device, queries)
    keys = resolve_sequences("attention", k.shape[0], k.shape[1], k.device, keys)
    if queries.count != keys.count:
        raise ValueError(
            f"attention: cu_seqlens names {queries.count} sequences, cu_seqlens_k {keys.count}"
        )
    segment = crossing(queries)
    if segment is not None:
        if keys is not queries:
            raise ValueError(
                "attention: sequences_k is given for a segment of a row, expected the keys of the "
                "segment's own tokens"
            )
        run = functools.partial(attention, scale=scale, window=window, backend=asked, watch=watch)
        return segmented_attention(
            lambda q, k, v, queries, keys: run(q, k, v, sequences=queries, sequences_k=keys),
            q,
            k,
            v,
            window,
            queries,
            segment,
        )
    if watch is not None and q.numel():
        logit = largest_logit(
            q.detach().flatten(0, 1), k.detach().flatten(0, 1), queries, keys, scale, window
        )
        watch({"logits": logit})
    if (asked, backend) == ("auto", "varlen") and _are_rows(queries, keys, window):
        backend = "sdpa"
    forms = {"explicit": explicit_attention, "sdpa": _sdpa, "varlen": _varlen, "flash": _flash}
    forms["planned"] = _planned
    if backend == fast == "sdpa" and is_planned(q):
        backend = "planned"
    output = forms[backend](
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), queries, keys, scale, window
    )
    return output.view(q.shape)


def fast_attention(q: Tensor) -> str:
    """Return the backend that ``auto`` takes for ``q`` ``[..., D]``."""
    low_precision = q.dtype in (torch.bfloat16, torch.float16)
    if not q.is_cuda or not low_precision or q.shape[-1] > 256 or q.shape[-1] % 8 or not q.numel():
        return "sdpa"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "sdpa"
    return "flash" if _flash_attention(q.device) else "varlen"


def _are_rows(queries: Sequences, keys: Sequences, window: int | None) -> bool:
    """Return whether the sequences are rows of one length that a causal mask alone describes."""
    if window is not None and window < queries.max_length:
        return False
    return queries.derive(_have_one_length) and (keys is queries or keys.lengths == queries.lengths)


def _have_one_length(sequences: Sequences) -> bool:
    return len(set(sequences.lengths)) == 1


@functools.cache
def _flash_attention(device: torch.device) -> Any:
    """Return ``flash_attn_varlen_func`` of the newest flash-attn here, or None."""
    names = ["flash_attn"]
    if torch.cuda.get_device_capability(device)[0] == 9:
        names.insert(0, "flash_attn_interface")  # version 3, for Hopper alone
    for name in names:
        if importlib.util.find_spec(name) is not None:
            try:
                return importlib.import_module(name).flash_attn_varlen_func
            except (ImportError, OSError, AttributeError):
                continue  # built for another torch; the log names what is taken instead
    return None


def flash_attention_name(device: torch.device) -> str:
    """Return which flash-attn runs, in words."""
    module = getattr(_flash_attention(device), "__module__", "")
    return "flash-attn 2" if module.startswith("flash_attn.") else "flash-attn 3"


def _int32(sequences: Sequences) -> Tensor:
    return sequences.cu_seqlens.int()


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Sequences,
    keys: Sequences,
    scale: float | None,
    window: int | None,
) -> Tensor:
    run = _flash_attention(q.device) if q.is_cuda else None
    if run is None:
        raise ValueError("attention: backend 'flash' needs flash-attn and CUDA; one is missing")
    output = run(
        q,
        k,
        v,
        queries.derive(_int32),
        keys.derive(_int32),
        queries.max_length,
        keys.max_length,
        softmax_scale=scale,
        causal=True,
        window_size=(-1 if window is None else window - 1, 0),
    )
    return output[0] if isinstance(output, tuple) else output  # version 3 once gave more


def _planned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Sequences,
    keys: Sequences,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Stand for the fused kernel of a GPU, which computes only the pairs that are seen."""
    pairs = 0.0
    for num_queries, num_keys in zip(queries.lengths, keys.lengths, strict=True):
        reach = num_keys if window is None else min(window, num_keys)
        growing = min(max(reach - (num_keys - num_queries), 0), num_queries)
        # The first queries see one key more each, up to the reach of all others.
        pairs += num_queries * reach - growing * (growing - 1) / 2
    flops = 4.0 * pairs * q.shape[1] * q.shape[2]
    a, b, c = (x.transpose(0, 1)[None] for x in (q, k, v))
    return planned_attention(a, b, c, flops)[0].transpose(0, 1)


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Sequences,
    keys: Sequences,
    scale: float | None,
    window: int | None,
) -> Tensor:
    if not q.is_cuda:
        raise ValueError(
            f"attention: backend 'varlen' needs CUDA tensors, found one on '{q.device.type}'"
        )
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            grouped["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    output: Any = varlen_attn(
        q,
        k,
        v,
        queries.derive(_int32),
        keys.derive(_int32),
        queries.max_length,
        keys.max_length,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    return output


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Sequences,
    keys: Sequences,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Attend by torch's function.

    Sequences of equal length share one call, and none ever sees another's keys.
    """
    lengths = list(zip(queries.lengths, keys.lengths, strict=True))
    if len(set(lengths)) == 1:
        n = len(lengths)
        a, b, c = (x.view(n, len(x) // n, *x.shape[1:]) for x in (q, k, v))
        return _sdpa_rows(a, b, c, scale, window).flatten(0, 1)
    parts = q.split(queries.lengths), k.split(keys.lengths), v.split(keys.lengths)
    outputs: list[Tensor] = [q[:0]] * len(lengths)
    groups: dict[tuple[int, int], list[int]] = {}
    for index, pair in enumerate(lengths):
        groups.setdefault(pair, []).append(index)
    for members in groups.values():
        a, b, c = (torch.stack([x[i] for i in members]) for x in parts)
        for i, output in zip(members, _sdpa_rows(a, b, c, scale, window), strict=True):
            outputs[i] = output
    return torch.cat(outputs) if outputs else torch.empty_like(q)


def _sdpa_rows(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
    num_queries, num_keys = q.shape[1], k.shape[1]
    if num_queries == 0:
        return torch.empty_like(q)
    mask = None
    causal = num_queries == num_keys and (window is None or window >= num_keys)
    if not causal and (num_queries > 1 or (window is not None and window < num_keys)):
        last = torch.arange(num_keys - num_queries, num_keys, device=q.device)[:, None]
        keys = torch.arange(num_keys, device=q.device)
        mask = keys <= last
        if window is not None:
            mask = mask & (keys > last - window)
    output = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return output.transpose(1, 2)
