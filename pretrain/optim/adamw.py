"""AdamW's update (arXiv 1711.05101), by torch's own function."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from pretrain.nn.maximal_update import elementwise_lr_multiple
from pretrain.nn.parameters import ParameterInfo

STATE_KEYS = ("exp_avg", "exp_avg_sq")


def selects(info: ParameterInfo) -> bool:
    """Return True: AdamW updates every parameter."""
    return True


def lr_multiple(info: ParameterInfo) -> float:
    """Return the multiple for updates whose elements are of one size."""
    return elementwise_lr_multiple(info.role, info.width)


def implementation(device_type: str) -> str:
    """Return which of torch's implementations updates parameters on such a device.

    ``fused`` reads and writes every tensor once, where ``foreach`` makes ten passes and holds a
    root of every element meanwhile.
    """
    return "fused" if device_type == "cuda" else "foreach"


def update(
    params: Sequence[Tensor],
    state: MutableMapping[Tensor, dict[str, Tensor]],
    group: dict[str, Any],
) -> None:
    """Update parameters that have gradients; ``group``: lr, betas, eps, weight_decay, step."""
    device = params[0].device
    chosen = implementation(device.type)
    # The function counts the steps itself, in tensors that it is given: on the GPU for a fused
    # kernel, which reads them there, made without a copy that the host would wait for.
    home = device if chosen == "fused" else torch.device("cpu")
    steps = torch.full((len(params),), float(group["step"] - 1), device=home)
    adamw(
        list(params),
        [p.grad for p in params if p.grad is not None],
        [state[p]["exp_avg"] for p in params],
        [state[p]["exp_avg_sq"] for p in params],
        [],
        list(steps.unbind()),
        amsgrad=False,
        foreach=chosen == "foreach",
        fused=chosen == "fused",
        maximize=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
    )
