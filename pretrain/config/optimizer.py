"""The optimizer and the learning rate over steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from pretrain.common.config_loader import Config, setting

Schedule = Literal["constant", "linear", "cosine", "wsd", "two_stage"]
Decay = Literal["linear", "sqrt", "exponential"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
DECAYS: tuple[Decay, ...] = get_args(Decay)


@dataclass
class OptimizerConfig(Config):
    """AdamW, or Muon for the blocks' matrices; weight decay acts on matrices only."""

    kind: Literal["adamw", "muon"] = setting("adamw")
    """``muon`` updates the matrices of the blocks by their orthogonalised momentum, scaled to the
    size of AdamW's updates so that one learning rate and weight decay serve both (arXiv
    2502.16982). All other parameters stay with AdamW."""
    lr: float = setting(1e-3, above=0)
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of AdamW's first and second moment, each in [0, 1)."""
    eps: float = setting(1e-8, above=0)
    """Added to the root of the second moment."""
    weight_decay: float = setting(0.1, minimum=0)
    """Decoupled weight decay of matrices, times the learning rate at each step."""
    clip_grad: float = setting(1.0, minimum=0)
    """Largest global norm of the gradient; 0: gradients are not clipped."""
    muon_momentum: float = setting(0.95, minimum=0, below=1)
    """Nesterov momentum of ``muon``."""
    ema_decay: float = setting(0.0, minimum=0, below=1)
    """Decay of an exponential average of the weights over steps, saved with every checkpoint for
    ``python -m evals --weights ema`` (Polyak and Juditsky 1992; arXiv 2306.03241); 0: no
    average."""
    gradient_noise: float = setting(0.0, minimum=0)
    """eta of Gaussian noise of variance eta / (1 + step)^0.55 that is added to clipped gradients
    (arXiv 1511.06807); 0: no noise."""


@dataclass
class ScheduleConfig(Config):
    """The learning rate over steps, as a share of its peak ``optimizer.lr``."""

    kind: Schedule = setting("cosine")
    """``constant``; ``linear`` or ``cosine`` decay over the whole run; ``wsd``, constant and then a
    decay (arXiv 2404.06395); ``two_stage``, constant with an abrupt drop (arXiv 2408.11029)."""
    warmup_steps: int = setting(100, minimum=0)
    """Steps in which the learning rate grows linearly from 0."""
    decay: Decay = setting("linear")
    """Shape of the decay of ``wsd``."""
    decay_fraction: float = setting(0.2, above=0, maximum=1)
    """Share of all steps in which ``wsd`` decays, or at the end of the run which ``two_stage``
    spends behind its drop."""
    final_ratio: float = setting(0.1, minimum=0, maximum=1)
    """Learning rate where the decay ends, one step behind the last, as a share of the peak."""
