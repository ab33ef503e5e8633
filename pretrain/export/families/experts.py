"""Mixtures of experts of transformers, in terms of ours, and the families that add them alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from typing_extensions import override

from pretrain.common.errors import UserError
from pretrain.config import ModelConfig
from pretrain.export.families.attention import Llama, Qwen3
from pretrain.export.families.base import (
    Weight,
    expect,
    first_difference,
    same,
    swiglu_weights,
)
from pretrain.model.spec import BlockSpec


def sparse_settings(theirs: Any) -> dict[str, Any]:
    """Return the settings of the experts of Qwen's models.

    Raises UserError where blocks with experts are not all that follow the first without.
    """
    expect(theirs, decoder_sparse_step=1)
    dense = sorted(theirs.mlp_only_layers or ())
    if dense != list(range(len(dense))):
        raise UserError(
            f"the model's mlp_only_layers is {dense}, expected its first layers alone, or none"
        )
    return {
        "num_experts": theirs.num_experts,
        "top_k": theirs.num_experts_per_tok,
        "intermediate_size": theirs.moe_intermediate_size,
        "first_dense": len(dense),
        "normalize_top_k": theirs.norm_topk_prob,
    }


def sparse_config(config: ModelConfig) -> dict[str, Any]:
    """Return the settings of Qwen's models of our experts."""
    moe = config.moe
    assert moe is not None
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "norm_topk_prob": moe.normalize_top_k,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(moe.first_dense)),
    }


def expert_difference(
    config: ModelConfig, *, shared: bool | None = False, gate: bool = False, plain: bool = False
) -> str | None:
    """Return what our experts have that those of a family have not, or the other way round.

    ``shared``: whether there is an expert for every token, None: there may be; ``gate``: whether it
    has a gate; ``plain``: whether weights are normalised and all blocks have experts.
    """
    moe = config.moe
    if moe is None:
        return "there are no experts"
    has = moe.shared_intermediate_size > 0
    return first_difference(
        (
            (f"experts are scored by a {moe.score}", moe.score != "softmax"),
            ("the weights of experts are scaled", moe.weight_scale != 1),
            ("experts have biases of balance", moe.bias_update_rate > 0),
            (f"{'an' if has else 'no'} expert is shared", shared is not None and has != shared),
            (
                f"the shared expert has {'a' if moe.shared_gate else 'no'} gate",
                has and moe.shared_gate != gate,
            ),
            ("the weights of experts are not normalised", plain and not moe.normalize_top_k),
            ("the first blocks have no experts", plain and moe.first_dense > 0),
        )
    )


def transposed(theirs: str, ours: str) -> Weight:
    """Return the matrices of all experts ``[E, out, in]``, which are ``[E, in, out]`` here."""
    return Weight(theirs, (ours,), lambda x: (x.mT,), lambda parts: parts[0].mT)


def expert_weights(theirs: str, ours: str, router: str = "gate") -> Iterator[Weight]:
    """Yield the weights of the experts that are chosen, whose router is called ``router``."""
    yield same(f"{theirs}.{router}.weight", f"{ours}.router")
    for name in ("gate_up_proj", "down_proj"):
        yield transposed(f"{theirs}.experts.{name}", f"{ours}.{name}")


def one_by_one(
    name: str, value: Tensor, parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Iterator[tuple[str, Tensor]]:
    """Yield a weight as it lies in files: experts by themselves, their parts called ``parts``."""
    place, found, which = name.rpartition(".experts.")
    if not found:
        yield name, value
        return
    gate, up, down = parts
    for number, matrix in enumerate(value):
        where = f"{place}.experts.{number}"
        if which == "down_proj":
            yield f"{where}.{down}.weight", matrix.contiguous()
        else:
            for part, half in zip((gate, up), matrix.chunk(2), strict=True):
                yield f"{where}.{part}.weight", half.contiguous()


class Qwen3MoE(Qwen3):
    """Qwen3 with experts in the place of its MLPs."""

    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    experts = True

    @override
    def model_of(self, theirs: Any) -> dict[str, Any]:
        return {**super().model_of(theirs), "moe": sparse_settings(theirs)}

    @override
    def reason_against(self, config: ModelConfig) -> str | None:
        return super().reason_against(config) or expert_difference(config)

    @override
    def config_of(self, config: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        return {**super().config_of(config, vocab_size, seq_len), **sparse_config(config)}

    @override
    def mlp_weights(self, theirs: str, ours: str, spec: BlockSpec) -> Iterator[Weight]:
        if spec.moe is None:
            yield from swiglu_weights(f"{theirs}.mlp", f"{ours}.mlp")
        else:
            yield from expert_weights(f"{theirs}.mlp", f"{ours}.mlp")

    @override
    def filed(self, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        return one_by_one(name, value)


class Mixtral(Llama):
    """Mixtral: Llama with experts in the place of its MLPs."""

    model_type = "mixtral"
    architecture = "MixtralForCausalLM"
    experts = True

    @override
    def model_of(self, theirs: Any) -> dict[str, Any]:
        expect(theirs, sliding_window=None)
        experts = {
            "num_experts": theirs.num_local_experts,
            "top_k": theirs.num_experts_per_tok,
            "intermediate_size": theirs.intermediate_size,
        }
        return {**super().model_of(theirs), "moe": experts}

    @override
    def reason_against(self, config: ModelConfig) -> str | None:
        return super().reason_against(config) or expert_difference(config, plain=True)

    @override
    def config_of(self, config: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        moe = config.moe
        assert moe is not None
        found = super().config_of(config, vocab_size, seq_len)
        for name in ("attention_bias", "mlp_bias"):
            del found[name]
        return {
            **found,
            "intermediate_size": moe.intermediate_size,
            "num_local_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "sliding_window": None,
        }

    @override
    def mlp_weights(self, theirs: str, ours: str, spec: BlockSpec) -> Iterator[Weight]:
        return expert_weights(f"{theirs}.mlp", f"{ours}.mlp")

    @override
    def filed(self, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        return one_by_one(name.replace(".mlp.", ".block_sparse_moe."), value, ("w1", "w3", "w2"))


def gated_expert_weights(theirs: str, ours: str) -> Iterator[Weight]:
    """Yield the weights of experts with a shared one, which has a gate."""
    yield from expert_weights(theirs, ours)
    yield from swiglu_weights(f"{theirs}.shared_expert", f"{ours}.shared")
    yield same(f"{theirs}.shared_expert_gate.weight", f"{ours}.shared_gate")
