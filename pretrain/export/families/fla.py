"""Models of flash-linear-attention, of one kind of layer and attention, read from their files.

Their classes need a GPU, so that nothing of ours is exported as one of them unasked: a file of our
own code runs anywhere.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from pretrain.common.errors import UserError
from pretrain.config import ModelConfig
from pretrain.export.families.base import (
    Family,
    Weight,
    expect,
    model_weights,
    same,
    swiglu_weights,
)
from pretrain.export.families.fla_hybrid import attention_layers, attention_weights
from pretrain.model.spec import block_specs
from pretrain.nn.mixers import registry

# What every config of theirs has where its file does not say.
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 2048,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "hidden_act": "swish",
    "num_hidden_layers": 24,
    "max_position_embeddings": 2048,
    "norm_eps": 1e-6,
    "attn": None,
    "attnres_block_size": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


class FlaFamily(Family):
    """A model of blocks of one kind of layer, or of attention in its place, and a SwiGLU.

    ``mixer`` is what it is called here, ``defaults`` its settings where a file does not name them,
    ``renamed`` our names of a layer's weights by theirs, and ``plain`` those that both call alike.
    """

    mixer: ClassVar[str]
    defaults: ClassVar[dict[str, Any]]
    renamed: ClassVar[dict[str, str]] = {}
    plain: ClassVar[tuple[str, ...]] = ()
    convolved: ClassVar[str] = ""

    def settings(self, described: Mapping[str, Any]) -> Any:
        """Return their config with its defaults, as an object."""
        return SimpleNamespace(**{**_DEFAULTS, **self.defaults, **described})

    @abstractmethod
    def mixer_of(self, theirs: Any) -> dict[str, Any]:
        """Return the settings of our mixer. Raises UserError for what it does not do."""

    @override
    def model_of(self, theirs: Any) -> dict[str, Any]:
        expect(theirs, hidden_act="swish", attnres_block_size=None)
        hybrid = attention_layers(theirs)
        names = [hybrid.names.get(i, self.mixer) for i in range(theirs.num_hidden_layers)]
        width = theirs.intermediate_size
        if width is None:
            ratio = theirs.hidden_ratio or 4
            width = -(-int(theirs.hidden_size * ratio * 2 / 3) // 256) * 256
        return {
            "pattern": " ".join(names),
            "hidden_size": theirs.hidden_size,
            "mixers": {self.mixer: self.mixer_of(theirs), **hybrid.mixers},
            "mlp": {"kind": "swiglu", "intermediate_size": width},
            "vocab_size": theirs.vocab_size,
            "tie_embeddings": bool(theirs.tie_word_embeddings),
            "norm_eps": theirs.norm_eps,
        }

    @override
    def reason_against(self, config: ModelConfig) -> str | None:
        return "it runs on GPUs alone"

    @override
    def config_of(self, config: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        raise UserError(
            f"a model cannot be exported as {self.model_type}, which runs on GPUs alone"
        )

    @override
    def weights(self, config: ModelConfig) -> Iterator[Weight]:
        yield from model_weights(config, "model.embeddings.weight", "model.norm.weight")
        specs = block_specs(config)
        for index, spec in enumerate(specs):
            theirs, ours = f"model.layers.{index}", f"blocks.{index}"
            yield same(f"{theirs}.attn_norm.weight", f"{ours}.mixer_norm.weight")
            if spec.mixer is registry()["attn"]:
                yield from attention_weights(f"{theirs}.attn", f"{ours}.mixer", spec.config)
            else:
                yield from self._mixer_weights(f"{theirs}.attn", f"{ours}.mixer", spec.config)
            yield same(f"{theirs}.mlp_norm.weight", f"{ours}.mlp_norm.weight")
            yield from swiglu_weights(f"{theirs}.mlp", f"{ours}.mlp")

    def _mixer_weights(self, theirs: str, ours: str, config: Any) -> Iterator[Weight]:
        for name in self.plain:
            yield same(f"{theirs}.{name}", f"{ours}.{name}")
        for other, name in self.renamed.items():
            yield same(f"{theirs}.{other}", f"{ours}.{name}")
        for name in self.convolved if getattr(config, "conv_size", 0) else "":
            # Any number of rows: there is nothing to divide.
            yield _one_convolution(f"{theirs}.{name}_conv1d.weight", f"{ours}.{name}_conv")


def _one_convolution(theirs: str, ours: str) -> Weight:
    return Weight(theirs, (ours,), lambda x: (x.squeeze(1),), lambda parts: parts[0].unsqueeze(1))


def _projections(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}_proj.weight" for name in names)


def _conv_size(theirs: Any) -> int:
    return int(theirs.conv_size) if theirs.use_short_conv else 0


class GatedDeltaNet(FlaFamily):
    """Gated DeltaNet."""

    model_type = "gated_deltanet"
    architecture = "GatedDeltaNetForCausalLM"
    mixer = "gdn"
    defaults: ClassVar[dict[str, Any]] = {
        "num_hidden_layers": 21,
        "expand_v": 2.0,
        "use_gate": True,
        "use_short_conv": True,
        "allow_neg_eigval": False,
        "conv_size": 4,
        "head_dim": 256,
        "num_heads": 6,
        "num_v_heads": None,
        "output_gate_activation": "swish",
    }
    plain = ("A_log", "dt_bias", *_projections("q", "k", "v", "g", "a", "b", "o"))
    renamed: ClassVar[dict[str, str]] = {"o_norm.weight": "norm"}
    convolved = "qkv"

    @override
    def mixer_of(self, theirs: Any) -> dict[str, Any]:
        expect(theirs, use_gate=True, output_gate_activation="swish")
        return {
            "num_heads": theirs.num_v_heads or theirs.num_heads,
            "num_qk_heads": theirs.num_heads,
            "head_dim": theirs.head_dim,
            "expand_v": theirs.expand_v,
            "conv_size": _conv_size(theirs),
            "allow_neg_eigval": theirs.allow_neg_eigval,
            "norm_eps": theirs.norm_eps,
        }


class DeltaNet(FlaFamily):
    """DeltaNet."""

    model_type = "delta_net"
    architecture = "DeltaNetForCausalLM"
    mixer = "deltanet"
    defaults: ClassVar[dict[str, Any]] = {
        "expand_k": 1.0,
        "expand_v": 1.0,
        "use_gate": False,
        "use_short_conv": True,
        "allow_neg_eigval": False,
        "conv_size": 4,
        "use_beta": True,
        "use_output_norm": True,
        "num_heads": 16,
        "qk_norm": "l2",
        "qk_activation": "silu",
    }
    plain = _projections("q", "k", "v", "b", "o")
    renamed: ClassVar[dict[str, str]] = {"o_norm.weight": "norm"}
    convolved = "qkv"

    @override
    def mixer_of(self, theirs: Any) -> dict[str, Any]:
        expect(theirs, use_gate=False, use_beta=True, use_output_norm=True, expand_k=1.0)
        expect(theirs, qk_norm="l2", qk_activation="silu")
        return {
            "num_heads": theirs.num_heads,
            "head_dim": theirs.hidden_size // theirs.num_heads,
            "expand_v": theirs.expand_v,
            "conv_size": _conv_size(theirs),
            "allow_neg_eigval": theirs.allow_neg_eigval,
            "norm_eps": theirs.norm_eps,
        }


class _LinearAttention(FlaFamily):
    """A layer of linear attention whose heads are shares of the model's width."""

    @override
    def mixer_of(self, theirs: Any) -> dict[str, Any]:
        expect(theirs, num_kv_heads=None, feature_map=None, use_short_conv=False)
        expect(theirs, use_output_gate=True)
        return {
            "num_heads": theirs.num_heads,
            "head_dim": int(theirs.hidden_size * theirs.expand_k) // theirs.num_heads,
            "expand_v": theirs.expand_v / theirs.expand_k,
            "norm_eps": theirs.norm_eps,
        }

    @override
    def renamed_weights(
        self, weights: Mapping[str, Tensor], config: ModelConfig
    ) -> Mapping[str, Tensor]:
        # The norm has a name of its own where it is fused with the gate.
        return {n.replace(".g_norm_swish_gate.", ".g_norm."): x for n, x in weights.items()}


class GatedLinearAttention(_LinearAttention):
    """Gated linear attention."""

    model_type = "gla"
    architecture = "GLAForCausalLM"
    mixer = "gla"
    defaults: ClassVar[dict[str, Any]] = {
        "expand_k": 0.5,
        "expand_v": 1.0,
        "num_heads": 4,
        "num_kv_heads": None,
        "feature_map": None,
        "use_short_conv": False,
        "use_output_gate": True,
        "clamp_min": None,
        "use_gk": True,
        "use_gv": False,
    }
    plain = _projections("q", "k", "v", "g", "o")
    renamed: ClassVar[dict[str, str]] = {
        "gk_proj.0.weight": "a_down.weight",
        "gk_proj.1.weight": "a_up.weight",
        "gk_proj.1.bias": "a_bias",
        "g_norm.weight": "norm",
    }

    @override
    def mixer_of(self, theirs: Any) -> dict[str, Any]:
        expect(theirs, use_gk=True, clamp_min=None, use_gv=False)
        return super().mixer_of(theirs)


class RetNet(_LinearAttention):
    """RetNet."""

    model_type = "retnet"
    architecture = "RetNetForCausalLM"
    mixer = "retnet"
    defaults: ClassVar[dict[str, Any]] = {
        "expand_k": 1.0,
        "expand_v": 2.0,
        "hidden_ratio": 2,
        "num_heads": 8,
        "num_kv_heads": None,
        "feature_map": None,
        "use_short_conv": False,
        "use_output_gate": True,
    }
    plain = _projections("q", "k", "v", "g", "o")
    renamed: ClassVar[dict[str, str]] = {"g_norm.weight": "norm"}


class _LowerBounded(FlaFamily):
    """Layers whose forget gates have lower bounds, in a table of all of them."""

    @override
    def weights(self, config: ModelConfig) -> Iterator[Weight]:
        yield from super().weights(config)
        yield same("model.lower_bounds", f"tables.{self.mixer}.lower_bounds.weight")


class HGRN(_LowerBounded):
    """HGRN with lower bounds that its layers share."""

    model_type = "hgrn"
    architecture = "HGRNForCausalLM"
    mixer = "hgrn"
    defaults: ClassVar[dict[str, Any]] = {
        "expand_ratio": 1,
        "use_short_conv": False,
        "conv_size": 4,
        "use_lower_bound": True,
        "elementwise_affine": True,
    }
    plain = _projections("i", "f", "g", "o")
    renamed: ClassVar[dict[str, str]] = {"g_norm.weight": "norm"}
    convolved = "if"

    @override
    def mixer_of(self, theirs: Any) -> dict[str, Any]:
        # Their table has rows for attention too.
        expect(theirs, use_lower_bound=True, elementwise_affine=True, attn=None)
        return {
            "expand": float(theirs.expand_ratio),
            "conv_size": _conv_size(theirs),
            "lower_bound": "shared",
            "norm_eps": theirs.norm_eps,
        }


class HGRN2(_LowerBounded):
    """HGRN2 with lower bounds that its layers share."""

    model_type = "hgrn2"
    architecture = "HGRN2ForCausalLM"
    mixer = "hgrn2"
    defaults: ClassVar[dict[str, Any]] = {
        "num_heads": None,
        "expand_ratio": 128,
        "use_short_conv": False,
        "use_lower_bound": True,
    }
    plain = _projections("q", "f", "i", "o")
    renamed: ClassVar[dict[str, str]] = {"g_norm.weight": "norm"}

    @override
    def mixer_of(self, theirs: Any) -> dict[str, Any]:
        # Their table has rows for attention too.
        expect(theirs, use_short_conv=False, use_lower_bound=True, attn=None)
        width = theirs.expand_ratio or theirs.hidden_size // theirs.num_heads
        return {
            "num_heads": theirs.num_heads or theirs.hidden_size // width,
            "head_dim": width,
            "lower_bound": "shared",
            "norm_eps": 1e-5,  # whatever the config says
        }


class KimiDeltaAttention(FlaFamily):
    """Kimi delta attention."""

    model_type = "kda"
    architecture = "KDAForCausalLM"
    mixer = "kda"
    defaults: ClassVar[dict[str, Any]] = {
        "expand_v": 1.0,
        "use_short_conv": True,
        "allow_neg_eigval": False,
        "safe_gate": False,
        "lower_bound": None,
        "conv_size": 4,
        "head_dim": 128,
        "num_heads": 16,
        "num_v_heads": None,
    }
    plain = ("A_log", "dt_bias", *_projections("q", "k", "v", "b", "o"))
    renamed: ClassVar[dict[str, str]] = {
        "f_proj.0.weight": "a_down.weight",
        "f_proj.1.weight": "a_up.weight",
        "g_proj.0.weight": "g_down.weight",
        "g_proj.1.weight": "g_up.weight",
        "g_proj.1.bias": "g_bias",
        "o_norm.weight": "norm",
    }
    convolved = "qkv"

    @override
    def mixer_of(self, theirs: Any) -> dict[str, Any]:
        expect(theirs, expand_v=1.0, safe_gate=False, lower_bound=None)
        if theirs.num_v_heads is not None:
            expect(theirs, num_v_heads=theirs.num_heads)
        return {
            "num_heads": theirs.num_heads,
            "head_dim": theirs.head_dim,
            "conv_size": _conv_size(theirs),
            "allow_neg_eigval": theirs.allow_neg_eigval,
            "gate_bias": True,
            "norm_eps": theirs.norm_eps,
        }
