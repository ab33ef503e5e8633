"""Qwen3-Next: the layers of Qwen3.5, projected key by key, and experts of which one is shared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pretrain.config import ModelConfig
from pretrain.export.families.base import Weight, swiglu_weights
from pretrain.export.families.experts import (
    expert_difference,
    gated_expert_weights,
    one_by_one,
    sparse_config,
    sparse_settings,
)
from pretrain.export.families.qwen3_5 import Qwen35
from pretrain.model.spec import BlockSpec


class Qwen3Next(Qwen35):
    """Qwen3-Next, whose experts may begin behind some blocks with MLPs."""

    model_type = "qwen3_next"
    architecture = "Qwen3NextForCausalLM"
    experts = True

    @override
    def model_of(self, theirs: Any) -> dict[str, Any]:
        experts = {
            **sparse_settings(theirs),
            "shared_intermediate_size": theirs.shared_expert_intermediate_size,
            "shared_gate": True,
        }
        return {**super().model_of(theirs), "moe": experts}

    @override
    def reason_against(self, config: ModelConfig) -> str | None:
        return super().reason_against(config) or expert_difference(config, shared=True, gate=True)

    @override
    def config_of(self, config: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        moe = config.moe
        assert moe is not None
        return {
            **super().config_of(config, vocab_size, seq_len),
            **sparse_config(config),
            "shared_expert_intermediate_size": moe.shared_intermediate_size,
        }

    @override
    def gdn_projections(self, theirs: str, ours: str, config: Any) -> Iterator[Weight]:
        keys = config.num_qk_heads
        heads = config.num_heads // keys  # of a key
        widths = {"q": config.head_dim, "k": config.head_dim}
        widths |= dict.fromkeys("vg", heads * config.value_dim)
        yield _by_key(f"{theirs}.in_proj_qkvz.weight", ours, keys, widths)
        yield _by_key(f"{theirs}.in_proj_ba.weight", ours, keys, {"b": heads, "a": heads})

    @override
    def mlp_weights(self, theirs: str, ours: str, spec: BlockSpec) -> Iterator[Weight]:
        if spec.moe is None:
            yield from swiglu_weights(f"{theirs}.mlp", f"{ours}.mlp")
        else:
            yield from gated_expert_weights(f"{theirs}.mlp", f"{ours}.mlp")

    @override
    def filed(self, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        return one_by_one(name, value)


def _by_key(theirs: str, ours: str, num_keys: int, widths: Mapping[str, int]) -> Weight:
    """Return a weight that has the rows of several projections, ``widths`` of each, key by key."""

    def split(x: Tensor) -> Sequence[Tensor]:
        parts = x.unflatten(0, (num_keys, -1)).split([*widths.values()], 1)
        return [part.flatten(0, 1) for part in parts]

    def join(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([x.unflatten(0, (num_keys, -1)) for x in parts], 1).flatten(0, 1)

    return Weight(theirs, tuple(f"{ours}.{name}_proj.weight" for name in widths), split, join)
