"""The optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pretrain.common.config_loader import Config, setting

# The rules that update whole matrices, which ZeRO-1 then deals out as a whole; the others work
# element by element.
WHOLE_MATRICES = frozenset({"muon"})


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
    """Decoupled weight decay of matrices, times the learning rate at each step. With
    ``model.mup_base_hidden_size`` that is ``lr``, not the matrix's own: at every width weights
    forget as fast."""
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
