"""AdamW with the state layout of the fused Adams that megatron-core was written for, Muon for the
groups marked so, and an average of the weights beside either.

The step count lives in the parameter group instead of in a tensor per parameter. megatron-core's
distributed optimizer saves and restores only that layout completely; with ``torch.optim.AdamW`` its
checkpoints fail or, worse, resume differently. The update itself is torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adamw import adamw

from pretrain.optim.muon import muon_step


def _plain(method: Any) -> Any:
    return getattr(method, "__wrapped__", method)


class AdamW(torch.optim.Optimizer):
    """arXiv 1711.05101. Groups: lr, betas, eps, weight_decay, step; ``muon``: updated by
    :func:`pretrain.optim.muon.muon_step` instead; ema_decay: of the weights' average ``ema`` in
    the state, 0 = none."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ):
        if not adam_w_mode:
            raise ValueError("only decoupled weight decay (adam_w_mode=True) is implemented")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": True,
        }
        super().__init__(params, defaults)

    # torch keeps its compiler off these methods, and imports the compiler to do so: a second of
    # every start, and nothing here is compiled.
    add_param_group = _plain(torch.optim.Optimizer.add_param_group)
    load_state_dict = _plain(torch.optim.Optimizer.load_state_dict)
    state_dict = _plain(torch.optim.Optimizer.state_dict)
    zero_grad = _plain(torch.optim.Optimizer.zero_grad)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            # Counted also where this process holds none of the group's parameters.
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                fill_state(self.state[p], p, group)
            if group.get("muon"):
                muon_step(params, self.state, group)
            else:
                self._adamw_step(params, group)
            if group.get("ema_decay"):
                # Less at first, so that the random start is soon forgotten.
                decay = min(group["ema_decay"], (1 + group["step"]) / (10 + group["step"]))
                averages = [self.state[p]["ema"] for p in params]
                torch._foreach_lerp_(averages, params, 1 - decay)

    def _adamw_step(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
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


def state_keys(group: dict[str, Any]) -> tuple[str, ...]:
    """What the state of a group's parameters consists of."""
    moments = ("exp_avg",) if group.get("muon") else ("exp_avg", "exp_avg_sq")
    return (*moments, "ema") if group.get("ema_decay") else moments


def fill_state(
    state: dict[str, torch.Tensor], parameter: torch.Tensor, group: dict[str, Any]
) -> None:
    """What a parameter has before its first update; what is there stays."""
    for key in state_keys(group):
        if key not in state:
            start = parameter.detach().clone() if key == "ema" else torch.zeros_like(parameter)
            state[key] = start


def install() -> None:
    """Make megatron-core use this class where neither Transformer Engine nor Apex is present."""
    import megatron.core.optimizer as optimizers
    import megatron.core.optimizer.distrib_optimizer as distributed

    if not optimizers.USING_PYTORCH_OPTIMIZER:
        return
    optimizers.Adam = distributed.Adam = AdamW
    optimizers.USING_PYTORCH_OPTIMIZER = False
    distributed.HAVE_APEX_OR_TE = True
    distributed.USING_APEX_OPTIMIZER = True
