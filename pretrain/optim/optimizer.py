"""The optimizer: update rules by parameter group, and an average of the weights.

A rule is a module of this package named in ``OptimizerConfig.kind``. It has ``STATE_KEYS``, the
names of its tensors per parameter (of a checkpoint too); ``selects(info)``, which parameters are
its (AdamW updates the others); ``lr_multiple(info)``, by which maximal-update parametrization
multiplies a parameter's learning rate; and ``update(params, state, group)``, one step. ``group``
has the common settings and those whose names begin with the rule's, as ``muon_momentum`` does.

The step count lives in the parameter group, as in the fused Adams that megatron-core was written
for, instead of in a tensor per parameter: its distributed optimizer saves and restores only that
layout completely.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from pretrain.nn.parameters import ParameterInfo

GATHERED_AT_ONCE = 256 * 2**20
"""Bytes of updated parameters that processes send each other at a time, where ZeRO-1 deals them out
as a whole."""


class UpdateRule(Protocol):
    """The interface of a module of an update rule."""

    STATE_KEYS: tuple[str, ...]

    def selects(self, info: ParameterInfo) -> bool:
        """Return whether a parameter is updated by this rule."""
        ...

    def lr_multiple(self, info: ParameterInfo) -> float:
        """Return the multiple of a parameter's learning rate, 1 at the base model's width."""
        ...

    def update(
        self,
        params: Sequence[Tensor],
        state: MutableMapping[Tensor, dict[str, Tensor]],
        group: dict[str, Any],
    ) -> None:
        """Update ``params`` and their ``state`` in place, by the settings of ``group``."""
        ...


def rule(name: str) -> UpdateRule:
    """Return the update rule of a name."""
    return cast(UpdateRule, importlib.import_module(f"pretrain.optim.{name}"))


def rule_of(info: ParameterInfo, kind: str) -> str:
    """Return the name of the rule that updates a parameter where ``optimizer.kind`` is ``kind``."""
    return kind if rule(kind).selects(info) else "adamw"


def lr_multiple(info: ParameterInfo, kind: str, peak: float) -> float:
    """Return the multiple of a parameter's learning rate where ``optimizer.kind`` is ``kind``.

    ``peak`` is ``optimizer.lr``, which a parameter may have a limit of.
    """
    multiple = rule(rule_of(info, kind)).lr_multiple(info)
    return multiple if info.max_lr is None else min(multiple, info.max_lr / peak)


def _without_compiler(method: Any) -> Any:
    return getattr(method, "__wrapped__", method)


class Optimizer(torch.optim.Optimizer):
    """An optimizer that updates each group by its rule.

    Groups have lr, betas, eps, weight_decay, step; ``rule``, the name of the rule, AdamW if absent;
    ema_decay, of the weights' average ``ema`` in the state, 0 for none; and ``held``, with which a
    group is left out.
    """

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
    add_param_group = _without_compiler(torch.optim.Optimizer.add_param_group)
    load_state_dict = _without_compiler(torch.optim.Optimizer.load_state_dict)
    state_dict = _without_compiler(torch.optim.Optimizer.state_dict)
    zero_grad = _without_compiler(torch.optim.Optimizer.zero_grad)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            if group.get("held"):
                continue
            # Counted also where this process holds none of the group's parameters.
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                fill_state(self.state[p], p, group)
            rule(group.get("rule", "adamw")).update(params, self.state, group)
            if group.get("ema_decay"):
                # Less at first, so that the random start is soon forgotten.
                decay = min(group["ema_decay"], (1 + group["step"]) / (10 + group["step"]))
                averages = [self.state[p]["ema"] for p in params]
                torch._foreach_lerp_(averages, params, 1 - decay)


def state_keys(group: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the tensors that a group's parameters have in the state."""
    keys = rule(group.get("rule", "adamw")).STATE_KEYS
    return (*keys, "ema") if group.get("ema_decay") else keys


def fill_state(state: dict[str, Tensor], parameter: Tensor, group: dict[str, Any]) -> None:
    """Add what a parameter has before its first update; what is there stays."""
    for key in state_keys(group):
        if key not in state:
            start = parameter.detach().clone() if key == "ema" else torch.zeros_like(parameter)
            state[key] = start


@contextlib.contextmanager
def used_by_megatron() -> Iterator[None]:
    """Make megatron-core use this optimizer where it has no fused one, while open."""
    import megatron.core.optimizer as optimizers
    import megatron.core.optimizer.distrib_optimizer as distributed

    if not optimizers.USING_PYTORCH_OPTIMIZER:
        yield
        return
    wanted: list[tuple[Any, str, Any]] = [
        (optimizers, "Adam", Optimizer),
        (distributed, "Adam", Optimizer),
        (optimizers, "USING_PYTORCH_OPTIMIZER", False),
        (distributed, "HAVE_APEX_OR_TE", True),
        (distributed, "USING_APEX_OPTIMIZER", True),
    ]
    kept = [(module, name, getattr(module, name, None)) for module, name, _ in wanted]
    try:
        for module, name, value in wanted:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)
