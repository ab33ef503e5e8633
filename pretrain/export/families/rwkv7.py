"""RWKV-7, "Goose", as flash-linear-attention has it, read from its files.

Its first block normalises the embeddings before anything else, the residual stream too. That is a
function of one token, and so their rows are normalised once, when they are read.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import layer_norm
from typing_extensions import override

from pretrain.common.errors import UserError
from pretrain.config import ModelConfig
from pretrain.export.families.base import Weight, expect, model_weights, same
from pretrain.export.families.fla import FlaFamily
from pretrain.model.spec import block_specs

_EMBEDDING = "model.embeddings.weight"
_FIRST_NORM = "model.layers.0.pre_norm"
_MIXED = "rwkvag"  # inputs that each mix a token with the one before it
_LOW_RANK = {"w": "decay_bias", "a": "rate_bias", "v": "value_bias", "g": None}
_NORMS = {"attn_norm": "mixer_norm", "ffn_norm": "mlp_norm"}


def _vector(theirs: str, ours: str, *shape: int) -> Weight:
    """Return a vector of ours, which theirs has with more axes."""
    return Weight(theirs, (ours,), lambda x: (x.flatten(),), lambda parts: parts[0].reshape(shape))


def _is_stacked(name: str) -> bool:
    """Return whether a weight is all mixes of a layer's inputs, as older files have them."""
    return name.endswith(".attn.x_x")


def _affine(theirs: str, ours: str) -> Iterator[Weight]:
    for name in ("weight", "bias"):
        yield same(f"{theirs}.{name}", f"{ours}.{name}")


class RWKV7(FlaFamily):
    """RWKV-7: time mixing with the first layer's values, and channel mixing."""

    model_type = "rwkv7"
    architecture = "RWKV7ForCausalLM"
    mixer = "rwkv7"
    defaults: ClassVar[dict[str, Any]] = {
        "hidden_act": "sqrelu",
        "head_dim": 64,
        "num_heads": None,
        "decay_low_rank_dim": 64,
        "gate_low_rank_dim": 128,
        "a_low_rank_dim": 64,
        "v_low_rank_dim": 16,
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": 1e-5,
        "value_dim": None,
    }

    @override
    def mixer_of(self, theirs: Any) -> dict[str, Any]:
        width, count = theirs.hidden_size, theirs.num_hidden_layers
        if theirs.value_dim not in (None, width, [width] * count):
            raise UserError(
                f"the model's value_dim is {theirs.value_dim}, expected its width, {width}"
            )
        head_dim = theirs.head_dim or width // theirs.num_heads
        ranks = {"decay": "decay", "rate": "a", "value": "v", "gate": "gate"}
        return {
            "num_heads": width // head_dim,
            "head_dim": head_dim,
            # Null is a default of their layers, which ours share.
            **{
                f"{our}_rank": getattr(theirs, f"{name}_low_rank_dim")
                for our, name in ranks.items()
            },
            "norm_eps": theirs.norm_eps,
        }

    @override
    def model_of(self, theirs: Any) -> dict[str, Any]:
        # Their attention does not hand the first layer's values on.
        expect(theirs, hidden_act="sqrelu", norm_bias=True, attn=None)
        if theirs.norm_first:
            expect(theirs, tie_word_embeddings=False)  # the head's rows are not normalised
        width = theirs.intermediate_size
        if width is None:
            width = -(-int(theirs.hidden_size * (theirs.hidden_ratio or 4)) // 32) * 32
        return {
            "pattern": f"{theirs.num_hidden_layers}*rwkv7",
            "hidden_size": theirs.hidden_size,
            "mixers": {"rwkv7": self.mixer_of(theirs)},
            "mlp": {"kind": "rwkv", "intermediate_size": width},
            "norm": "layer",
            "vocab_size": theirs.vocab_size,
            "tie_embeddings": bool(theirs.tie_word_embeddings),
            "norm_eps": theirs.norm_eps,
        }

    @override
    def renamed_weights(
        self, weights: Mapping[str, Tensor], config: ModelConfig
    ) -> Mapping[str, Tensor]:
        changed: dict[str, Tensor] = {}
        if f"{_FIRST_NORM}.weight" in weights:
            weight, bias = (weights[f"{_FIRST_NORM}.{name}"].float() for name in ("weight", "bias"))
            rows = weights[_EMBEDDING].float()
            changed[_EMBEDDING] = layer_norm(
                rows, rows.shape[-1:], weight, bias, eps=config.norm_eps
            )
        for name in filter(_is_stacked, weights):
            layer = name.removesuffix("x_x")
            for letter, row in zip(_MIXED, weights[name], strict=True):
                changed[f"{layer}x_{letter}"] = row.reshape(1, 1, -1)
        return ChainMap(changed, weights)  # type: ignore[arg-type]  # it is only read

    @override
    def ignored(self, name: str, config: ModelConfig) -> bool:
        done = name.startswith(_FIRST_NORM) or _is_stacked(name)
        return done or super().ignored(name, config)

    @override
    def weights(self, config: ModelConfig) -> Iterator[Weight]:
        yield from model_weights(config, _EMBEDDING, "model.norm.weight")
        yield same("model.norm.bias", "final_norm.bias")
        for index, spec in enumerate(block_specs(config)):
            theirs, ours = f"model.layers.{index}", f"blocks.{index}"
            for other, name in _NORMS.items():
                yield from _affine(f"{theirs}.{other}", f"{ours}.{name}")
            yield from self._time_mixing(f"{theirs}.attn", f"{ours}.mixer", spec.config, index)
            yield same(f"{theirs}.ffn.x_k", f"{ours}.mlp.mix")
            yield same(f"{theirs}.ffn.key.weight", f"{ours}.mlp.up_proj.weight")
            yield same(f"{theirs}.ffn.value.weight", f"{ours}.mlp.down_proj.weight")

    def _time_mixing(self, theirs: str, ours: str, config: Any, index: int) -> Iterator[Weight]:
        for name in "rkvo":
            yield same(f"{theirs}.{name}_proj.weight", f"{ours}.{name}_proj.weight")
        for name in _MIXED:
            yield _vector(f"{theirs}.x_{name}", f"{ours}.mix_{name}", 1, 1, -1)
        yield same(f"{theirs}.k_k", f"{ours}.erase_scale")
        yield same(f"{theirs}.k_a", f"{ours}.rate_share")
        yield _vector(f"{theirs}.r_k", f"{ours}.bonus", config.num_heads, -1)
        yield same(f"{theirs}.g_norm.weight", f"{ours}.norm")
        yield same(f"{theirs}.g_norm.bias", f"{ours}.norm_bias")
        for name, bias in _LOW_RANK.items():
            if name == "v" and index == 0:  # whose values the others mix into theirs
                continue
            lora = f"{theirs}.{name}_lora.lora"
            yield same(f"{lora}.0.weight", f"{ours}.down.{name}.weight")
            yield same(f"{lora}.2.weight", f"{ours}.up.{name}.weight")
            if bias is not None:
                yield same(f"{lora}.2.bias", f"{ours}.{bias}")
