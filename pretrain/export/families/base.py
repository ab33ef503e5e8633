"""A family of models: their settings and weights as ours, and ours as theirs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pretrain.common.errors import UserError
from pretrain.config import ModelConfig
from pretrain.model.language_model import LanguageModel
from pretrain.model.spec import block_specs
from pretrain.nn.mixers import registry

_FACTORS = ("embedding_scale", "residual_scale", "logit_scale")


@dataclass(frozen=True)
class Weight:
    """One weight of theirs, and those of ours that it holds.

    ``split`` returns ours, and ``join``, its inverse, theirs.
    """

    theirs: str
    ours: tuple[str, ...]
    split: Callable[[Tensor], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor]], Tensor]


def same(theirs: str, ours: str) -> Weight:
    """Return a weight that is one of ours as it is."""
    return Weight(theirs, (ours,), lambda x: (x,), lambda parts: parts[0])


def rows(theirs: str, ours: Mapping[str, int]) -> Weight:
    """Return a weight whose rows are those of several of ours, so many each, one after another."""
    sizes = list(ours.values())

    def split(x: Tensor) -> Sequence[Tensor]:
        return x.split(sizes) if len(x) == sum(sizes) else (x,)

    return Weight(theirs, tuple(ours), split, lambda parts: torch.cat([*parts]))


def convolutions(theirs: str, ours: Mapping[str, int]) -> Weight:
    """Return the taps ``[C, 1, W]`` of a short convolution over several of ours, ``[C, W]``."""
    plain = rows(theirs, ours)
    return Weight(
        theirs,
        plain.ours,
        lambda x: plain.split(x.squeeze(1)),
        lambda parts: plain.join(parts).unsqueeze(1),
    )


def model_weights(config: ModelConfig, embedding: str, norm: str) -> Iterator[Weight]:
    """Yield the weights around a model's blocks, two of them by their names."""
    yield same(embedding, "embedding.weight")
    yield same(norm, "final_norm.weight")
    if not config.tie_embeddings:
        yield same("lm_head.weight", "head.weight")


def swiglu_weights(
    theirs: str, ours: str, names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")
) -> Iterator[Weight]:
    """Yield the weights of a SwiGLU, whose gate, other half and output are called ``names``."""
    for other, name in zip(names, ("gate_proj", "up_proj", "down_proj"), strict=True):
        yield same(f"{theirs}.{other}.weight", f"{ours}.{name}.weight")


def gdn_widths(config: Any) -> dict[str, int]:
    """Return the channels of a Gated DeltaNet's queries, keys and values."""
    keys = config.num_qk_heads * config.head_dim
    return {"q": keys, "k": keys, "v": config.num_heads * config.value_dim}


def gdn_sizes(config: Any) -> dict[str, int]:
    """Return the settings of their Gated DeltaNet's sizes."""
    return {
        "linear_num_key_heads": config.num_qk_heads,
        "linear_num_value_heads": config.num_heads,
        "linear_key_head_dim": config.head_dim,
        "linear_value_head_dim": config.value_dim,
        "linear_conv_kernel_dim": config.conv_size,
    }


def gdn_convolutions(theirs: str, ours: str, config: Any) -> Weight:
    """Return the taps of a Gated DeltaNet's queries, keys and values, which are one weight."""
    taps = {f"{ours}.{name}_conv": width for name, width in gdn_widths(config).items()}
    return convolutions(f"{theirs}.conv1d.weight", taps)


class Family(ABC):
    """Models of one ``model_type`` of transformers, which its ``architecture`` loads."""

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    experts: ClassVar[bool] = False  # whether blocks may have them

    @abstractmethod
    def model_of(self, theirs: Any) -> dict[str, Any]:
        """Return the values of our ModelConfig for their config.

        Raises UserError for what our layers do not do.
        """

    @abstractmethod
    def reason_against(self, config: ModelConfig) -> str | None:
        """Return why a model of ours is not of this family, or None if it is."""

    @abstractmethod
    def config_of(self, config: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        """Return their config of a model of ours that is of this family."""

    @abstractmethod
    def weights(self, config: ModelConfig) -> Iterable[Weight]:
        """Yield every weight of a model."""

    def renamed_weights(
        self, weights: Mapping[str, Tensor], config: ModelConfig
    ) -> Mapping[str, Tensor]:
        """Return their weights by the names of :meth:`weights`, where files may have others too."""
        return weights

    def filed(self, name: str, value: Tensor) -> Iterable[tuple[str, Tensor]]:
        """Return one of their weights as it lies in files, which may be several."""
        return ((name, value),)

    def longest_text(self, theirs: Any) -> int:
        """Return the tokens of the longest text that a model is made for."""
        return int(theirs.max_position_embeddings)

    def ignored(self, name: str, config: ModelConfig) -> bool:
        """Return whether one of their weights is nothing that is learned."""
        return name.endswith(".inv_freq") or (config.tie_embeddings and name == "lm_head.weight")


def expect(theirs: Any, **expected: Any) -> None:
    """Raise UserError where settings of theirs are not the only ones that ours can do."""
    for name, value in expected.items():
        found = getattr(theirs, name, value)
        if found != value:
            raise UserError(f"the model's {name} is {found}, expected {value}")


def first_difference(options: Iterable[tuple[str, bool]]) -> str | None:
    """Return the first of several reasons that holds."""
    return next((what for what, there in options if there), None)


def settings_by_mixer(
    config: ModelConfig, *names: str, experts: bool = False
) -> tuple[dict[str, Any], str | None]:
    """Return the settings of a model's mixers by name, and why they are not these, if they are not.

    Every one of ``names`` must be there, with the same settings in all its blocks, and no other.
    ``experts``: whether blocks may have them.
    """
    found: dict[str, Any] = {}
    for spec in block_specs(config):
        name = next((name for name in names if spec.mixer is registry()[name]), None)
        if name is None:
            return found, f"a block is {spec.name}"
        if spec.moe is not None and not experts:
            return found, "it has a mixture of experts"
        if found.setdefault(name, spec.config) != spec.config:
            return found, f"its {name} layers differ"
    missing = next((name for name in names if name not in found), None)
    return found, None if missing is None else f"no block is {missing}"


def general_reason(
    config: ModelConfig,
    *,
    mlp: str = "swiglu",
    capped: bool = False,
    norms: Mapping[str, str] | None = None,
    scaled: bool = False,
) -> str | None:
    """Return what a model has around its layers that a family has not.

    A family's blocks have an MLP of the kind ``mlp``, and its logits are ``capped`` or not; where
    they normalise is ``norms`` by the mixer, ``pre`` unless it says so. ``scaled``: whether factors
    on embeddings, residuals and logits may differ from 1.
    """
    wanted = {registry()[name]: norm for name, norm in (norms or {}).items()}
    for spec in block_specs(config):
        if spec.norm != wanted.get(spec.mixer, "pre"):
            return f"block_norm of {spec.name} is {spec.norm}"
    return first_difference(
        (
            (f"norm is {config.norm}", config.norm != "rms"),
            (f"the MLP is {config.mlp.kind}", config.mlp.kind != mlp),
            ("it is recursive", config.recursion is not None),
            (
                f"logits are {'not ' * capped}capped",
                (config.logit_softcap is not None) != capped,
            ),
            ("embeddings are scaled", config.scale_embeddings),
            *(
                (f"{name} is {getattr(config, name):g}", getattr(config, name) != 1)
                for name in _FACTORS
                if not scaled
            ),
            ("logits are scaled by the width", config.mup_base_hidden_size is not None),
        )
    )


@torch.no_grad()
def to_ours(family: Family, model: LanguageModel, weights: Mapping[str, Tensor]) -> None:
    """Copy their weights, by name, into a model of ours.

    Raises UserError naming a weight that is missing, of another shape, or of no use.
    """
    ours = dict(model.named_parameters())
    wanted = list(family.weights(model.model_config))
    names = {weight.theirs for weight in wanted}
    config = model.model_config
    unread = [n for n in weights if n not in names and not family.ignored(n, config)]
    if unread:
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        raise UserError(
            f"{unread[0]}{more}: weights that no layer of ours has, expected a plain "
            f"{family.model_type}"
        )
    filled: set[str] = set()
    for weight in wanted:
        found = weights.get(weight.theirs)
        targets = [ours[name] for name in weight.ours]
        expected = tuple(weight.join([torch.empty_like(x, device="meta") for x in targets]).shape)
        if found is None or found.shape != expected:
            shape = "missing" if found is None else tuple(found.shape)
            raise UserError(f"{weight.theirs} is {shape}, expected {expected}")
        for target, part in zip(targets, weight.split(found), strict=True):
            target.copy_(part)
        filled.update(weight.ours)
    if missing := set(ours) - filled:
        raise ValueError(f"{family.model_type} has no {sorted(missing)[0]}")


def to_theirs(
    family: Family, config: ModelConfig, ours: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield their weights, by name as their files have them, from ours."""
    left = set(ours)
    for weight in family.weights(config):
        yield from family.filed(weight.theirs, weight.join([ours[name] for name in weight.ours]))
        left -= set(weight.ours)
    if left:
        raise ValueError(f"{family.model_type} has no {sorted(left)[0]}")
