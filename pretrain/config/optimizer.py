"""The optimizer and the learning rate over steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from pretrain.common.config_loader import setting

SCHEDULES = ("constant", "linear", "cosine", "wsd", "two_stage")


DECAYS = ("linear", "sqrt", "exponential")


@dataclass
class OptimizerConfig:
    """AdamW; weight decay acts on matrices only. clip_grad: global norm, 0 = off.

    kind: ``muon`` updates the matrices of the blocks by their orthogonalised momentum
    (``muon_momentum``, Nesterov's), scaled to the size of AdamW's updates so that one learning rate
    and weight decay serve both (arXiv 2502.16982); all else stays with AdamW. ema_decay: of an
    exponential average of the weights over steps, saved with every checkpoint for
    ``python -m evals --weights ema``; 0 = none (Polyak and Juditsky 1992; arXiv 2306.03241).
    gradient_noise: eta of Gaussian noise of variance eta / (1 + step)^0.55 that is added to clipped
    gradients (arXiv 1511.06807).
    """

    kind: str = setting("adamw", choices=("adamw", "muon"))
    lr: float = setting(1e-3, above=0)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = setting(1e-8, above=0)
    weight_decay: float = setting(0.1, minimum=0)
    clip_grad: float = setting(1.0, minimum=0)
    muon_momentum: float = setting(0.95, minimum=0, below=1)
    ema_decay: float = setting(0.0, minimum=0, below=1)
    gradient_noise: float = setting(0.0, minimum=0)


@dataclass
class ScheduleConfig:
    """Learning rate over steps; see pretrain/optim/schedule.py.

    warmup_steps: linear from 0; decay_fraction: share of all steps in which ``wsd`` decays, or
    after which share ``two_stage`` drops; decay: shape of the wsd decay; final_ratio: learning rate
    as a share of the peak where the decay ends, one step behind the last.
    """

    kind: str = setting("cosine", choices=SCHEDULES)
    warmup_steps: int = setting(100, minimum=0)
    decay: str = setting("linear", choices=DECAYS)
    decay_fraction: float = setting(0.2, above=0, maximum=1)
    final_ratio: float = setting(0.1, minimum=0, maximum=1)
