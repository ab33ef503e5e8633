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


class Family(ABC):
    """Models of one ``model_type`` of transformers, which its ``architecture`` loads."""

    model_type: ClassVar[str]
    architecture: ClassVar[str]

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

    def ungrouped(self, theirs: Any, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return their weights as those of the model that :meth:`config_of` would describe.

        It gives every head what heads share where our layers do not share it.
        """
        return weights

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


def general_reason(config: ModelConfig) -> str | None:
    """Return what no family of transformers has, of the model around its layers."""
    return first_difference(
        (
            (f"block_norm is {config.block_norm}", config.block_norm != "pre"),
            ("it is recursive", config.recursion is not None),
            ("logits are capped", config.logit_softcap is not None),
            ("embeddings are scaled", config.scale_embeddings),
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
    """Yield their weights, by name, from ours."""
    for weight in family.weights(config):
        yield weight.theirs, weight.join([ours[name] for name in weight.ours])
