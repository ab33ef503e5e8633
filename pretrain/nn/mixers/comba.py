"""Comba (arXiv 2506.02475): feedback from the state by a key of its own, and from it to the query.

As in Gated DeltaNet, but the erase key is the key times c = sigmoid of a number learned for each
head, and reads the state before it decays, so that the transition is a number plus low rank; the
query is normalised after d c k has been taken from it, d learned for each head; the output gate is
a sigmoid. The layer of flash-linear-attention normalises the erase key again, which makes it the
key whatever c is; here c remains, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from typing_extensions import override

from pretrain.common.config_loader import setting
from pretrain.nn.mixers.base import LayerContext, MixerCard, register
from pretrain.nn.mixers.delta_rule import DeltaRuleMixer
from pretrain.nn.mixers.gated_deltanet import GatedDeltaNetConfig
from pretrain.nn.mixers.mitigations import recur
from pretrain.nn.mixers.parts import gate_parameter, l2_norm
from pretrain.nn.parameters import constant
from pretrain.ops import comba
from pretrain.ops.elementwise.fusing import fused
from pretrain.ops.elementwise.rms_norm import rms_norm_sigmoid_gate


@dataclass(frozen=True)
class CombaConfig(GatedDeltaNetConfig):
    """Settings of Comba."""

    erase_scale: bool = True
    """Whether the erase key is the key times c, learned for each head; else it is the key."""
    correction: float | None = setting(1.0)
    """What d starts from, the share of the erase key that is taken from the query, learned for each
    head; null: nothing is taken. In small models 0.02 may be better."""


@register("comba")
class Comba(DeltaRuleMixer):
    """Comba, as a mixer."""

    config_class = CombaConfig
    card = MixerCard(
        "Comba",
        "S_t = (a_t - c b_t k_t^T k_t) S_{t-1} + b_t k_t^T v_t;  o_t = (q_t - d c k_t) S_t",
        "H K V",
        "chunks, UT transform",
        "arXiv 2506.02475",
    )

    c: Parameter
    d: Parameter

    def __init__(self, config: CombaConfig, context: LayerContext):
        super().__init__(config, context)
        for name, start in self.scalars(config).items():
            value = gate_parameter(context.parallel, (self.num_heads,), constant(start))
            self.register_parameter(name, value)

    @staticmethod
    def scalars(config: CombaConfig) -> dict[str, float]:
        """Return what a head has a number for, and from which it starts."""
        found = {"c": 1.0} if config.erase_scale else {}
        return found if config.correction is None else {**found, "d": config.correction}

    @override
    def recurrence(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None,
        **options: Any,
    ) -> Tensor:
        assert log_decay is not None
        key = l2_norm(k)
        erase = key
        if self.config.erase_scale:
            k, erase = _scaled(k, self.c), _scaled(key, self.c)
        if self.config.correction is not None:
            q = _corrected(q, k, self.d)
        inputs = (l2_norm(q), key, v, erase, beta)
        return recur(self, comba, *inputs, log_decay=log_decay, **options)

    @override
    def gated_norm(self, y: Tensor, norm: Tensor, gate: Tensor) -> Tensor:
        return rms_norm_sigmoid_gate(y, norm, gate, self.config.norm_eps)

    @classmethod
    @override
    def num_parameters(cls, config: CombaConfig, hidden_size: int) -> int:
        scalars = config.num_heads * len(cls.scalars(config))
        return super().num_parameters(config, hidden_size) + scalars


@fused
def _scaled(k: Tensor, c: Tensor) -> Tensor:
    """Multiply ``[B, T, H, K]`` by the sigmoid of a number for each head."""
    return (k * c.sigmoid()[:, None]).to(k.dtype)


@fused
def _corrected(q: Tensor, k: Tensor, d: Tensor) -> Tensor:
    """Return ``q - d k``, in q's dtype."""
    return (q - d[:, None] * k).to(q.dtype)
