"""What the planner tells apart: kinds of parameters and of blocks, and what of them learns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from pretrain.common.errors import UserError
from pretrain.config import ModelConfig
from pretrain.model.freezing import check_matched, matches
from pretrain.model.language_model import LanguageModel
from pretrain.model.spec import block_specs

ParameterKind = tuple[torch.dtype, bool, str | None]
"""Of a parameter: (dtype, weight decay, update rule, None for one that does not learn)."""


def count_kinds(tensors: Iterable[tuple[ParameterKind, int]]) -> Counter[ParameterKind]:
    """Return how many elements there are of each kind."""
    found = Counter[ParameterKind]()
    for kind, count in tensors:
        found[kind] += count
    return found


def learning(tensors: Iterable[tuple[ParameterKind, int]]) -> int:
    """Return how many elements of parameters learn."""
    return sum(count for kind, count in tensors if kind[2] is not None)


def block_kinds(config: ModelConfig) -> list[str]:
    """Return the kind of every block; those in a loop differ by what it adds to them."""
    kinds, recursion = [spec.kind for spec in block_specs(config)], config.recursion
    if recursion is not None:
        added = ", LoRA" if recursion.lora_rank else ""
        added += ", scaled" if recursion.residual_scales else ""
        for index in range(recursion.prelude, len(kinds) - recursion.coda):
            kinds[index] += added
    return kinds


def freeze(model: LanguageModel, patterns: Sequence[str]) -> None:
    """Have the parameters that patterns match need no gradient.

    Raises UserError for patterns that match nothing, or everything.
    """
    names = [name for name, _ in model.named_parameters()]
    check_matched(patterns, {p for p in patterns if any(matches(name, [p]) for name in names)})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not matches(name, patterns))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            f"train.freeze and distill.freeze, {', '.join(patterns)}, leave the model nothing to "
            "learn; expected fewer patterns"
        )


def frozen_part(block: nn.Module) -> str:
    """Return what of a block does not learn, as an addition to the name of its kind."""
    learns = {name: p.requires_grad for name, p in block.named_parameters()}
    if all(learns.values()):
        return ""
    if not any(learns.values()):
        return ", frozen"
    parts: dict[str, None] = {}
    for name, learning_ in learns.items():
        part, _, rest = name.partition(".")
        whole = not any(learns[other] for other in learns if other.startswith(f"{part}."))
        if not learning_:
            parts[part if rest and whole else name] = None
    return f", {' '.join(parts)} frozen"
