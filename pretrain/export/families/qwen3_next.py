"""Qwen3-Next: the layers of Qwen3.5, projected head by head, and experts of which one is shared."""

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
    """Qwen3-Next. Heads of GDN that share a key get a copy of it each."""

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
    def ungrouped(self, theirs: Any, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        found = dict(super().ungrouped(theirs, weights))
        keys, values = theirs.linear_key_head_dim, theirs.linear_value_head_dim
        groups = theirs.linear_num_key_heads
        each = theirs.linear_num_value_heads // groups
        for name, value in weights.items():
            # A group has its query, its key, and then what each of its heads has.
            if name.endswith("in_proj_qkvz.weight"):
                sizes = [keys, keys, each * values, each * values]
            elif name.endswith("in_proj_ba.weight"):
                sizes = [0, 0, each, each]
            else:
                continue
            q, k, *of_heads = value.unflatten(0, (groups, -1)).split(sizes, 1)
            shared = [x.repeat_interleave(each, 0) for x in (q, k)]
            own = [x.unflatten(1, (each, -1)).flatten(0, 1) for x in of_heads]
            found[name] = torch.cat([*shared, *own], 1).flatten(0, 1)
        return found

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
        widths = {"q": config.head_dim, "k": config.head_dim}
        widths |= {"v": config.value_dim, "g": config.value_dim}
        yield _by_head(f"{theirs}.in_proj_qkvz.weight", ours, config.num_heads, widths)
        yield _by_head(f"{theirs}.in_proj_ba.weight", ours, config.num_heads, {"b": 1, "a": 1})

    @override
    def mlp_weights(self, theirs: str, ours: str, spec: BlockSpec) -> Iterator[Weight]:
        if spec.moe is None:
            yield from swiglu_weights(f"{theirs}.mlp", f"{ours}.mlp")
        else:
            yield from gated_expert_weights(f"{theirs}.mlp", f"{ours}.mlp")

    @override
    def filed(self, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        return one_by_one(name, value)


def _by_head(theirs: str, ours: str, num_heads: int, widths: Mapping[str, int]) -> Weight:
    """Return a weight that has the rows of several projections of ours head after head."""

    def split(x: Tensor) -> Sequence[Tensor]:
        parts = x.unflatten(0, (num_heads, -1)).split([*widths.values()], 1)
        return [part.flatten(0, 1) for part in parts]

    def join(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([x.unflatten(0, (num_heads, -1)) for x in parts], 1).flatten(0, 1)

    return Weight(theirs, tuple(f"{ours}.{name}_proj.weight" for name in widths), split, join)
