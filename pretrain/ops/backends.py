"""Names of the implementation that ``auto`` takes for each op here, for the log."""

from __future__ import annotations

import importlib.metadata

import torch

from pretrain.ops.attention.dispatch import fast_attention, flash_attention_name
from pretrain.ops.cross_entropy.linear_cross_entropy import has_liger
from pretrain.ops.shared.arguments import has_numba, triton_fits
from pretrain.ops.shared.flash_linear_attention import fla_fits


def describe_backends(dtype: torch.dtype = torch.bfloat16) -> str:
    """Describe in one line what runs the ops for ``dtype`` on this process's device."""
    if not torch.cuda.is_available():
        loops = f"; M2RNN compiled by {_version('numba')}" if has_numba() else ""
        return f"kernels: plain torch, on the CPU{loops}"
    x = torch.empty(1, 128, dtype=dtype, device="cuda")
    attention = fast_attention(x)
    named = {"varlen": "torch's varlen (sdpa for rows of one length)", "sdpa": "torch's sdpa"}
    softmax = flash_attention_name(x.device) if attention == "flash" else named[attention]
    linear = _version("flash-linear-attention") if fla_fits(x) else "chunked torch"
    if fla_fits(x) and not fla_fits(x, decay_per_head=True):
        linear += f" (with a decay per head chunked torch: {_version('triton')} is below 3.7.1)"
    ours = f"our kernels on {_version('triton')}" if triton_fits(x) else "plain torch"
    head = _version("liger-kernel") if has_liger() else "chunked torch"
    return (
        f"kernels: attention {softmax}; linear attention, delta rules, MesaNet and short "
        f"convolutions {linear}; M2RNN, ParaRNN and classical cells {ours}; cross entropy {head}"
    )


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package
