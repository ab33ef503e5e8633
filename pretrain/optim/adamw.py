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


def update(
    params: Sequence[Tensor],
    state: MutableMapping[Tensor, dict[str, Tensor]],
    group: dict[str, Any],
) -> None:
    """Update parameters that have gradients; ``group``: lr, betas, eps, weight_decay, step."""
    adamw(
        list(params),
        [p.grad for p in params if p.grad is not None],
        [state[p]["exp_avg"] for p in params],
        [state[p]["exp_avg_sq"] for p in params],
        [],
        # The function counts the step itself, in tensors that it is given.
        [torch.tensor(float(group["step"] - 1)) for _ in params],
        amsgrad=False,
        foreach=True,
        maximize=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
    )
