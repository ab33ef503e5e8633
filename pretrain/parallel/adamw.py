"""AdamW with the state layout of the fused Adams that megatron-core was written for.

The step count lives in the parameter group instead of in a tensor per parameter. megatron-core's
distributed optimizer saves and restores only that layout completely; with ``torch.optim.AdamW`` its
checkpoints fail or, worse, resume differently. The update itself is torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adamw import adamw


class AdamW(torch.optim.Optimizer):
    """arXiv 1711.05101. Groups: lr, betas, eps, weight_decay, step."""

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
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "bias_correction": True,
        }  # fmt: skip
        super().__init__(params, defaults)

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
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            adamw(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                # The function counts the step itself, in tensors that it is given.
                [torch.tensor(float(group["step"] - 1)) for _ in params],
                amsgrad=False, foreach=True, maximize=False,
                beta1=group["betas"][0], beta2=group["betas"][1],
                lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            )  # fmt: skip


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
