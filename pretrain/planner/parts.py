"""The parts of a model, counted from its settings: together they are the whole model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.config import ModelConfig
from pretrain.model.counts import (
    block_flops,
    block_lora_parameters,
    block_parameters,
    loop_counts,
)
from pretrain.model.shared import shared_tables
from pretrain.model.spec import block_specs, passes
from pretrain.planner.kinds import block_kinds


@dataclass(frozen=True)
class Part:
    """One part of a full model.

    Attributes:
        name: That of the unit which the planner measures.
        number: How many of them the model has.
        used: How often a token goes through one of them, all together.
        parameters: Those of one, for all passes.
        flops: Forward matrix-multiply FLOPs of a token going through one, once.
    """

    name: str
    number: int
    used: int
    parameters: int
    flops: int


def model_parts(
    config: ModelConfig, vocab_size: int, seq_len: int, kinds: Sequence[str] | None = None
) -> list[Part]:
    """Return the embedding, the kinds of blocks, their tables, the rest of a loop, and the head.

    Their parameters and FLOPs add up to those of :func:`pretrain.model.counts.count_model`.
    ``kinds`` are the blocks' where they differ by more than the model, as by what is frozen.
    """
    d, recursion = config.hidden_size, config.recursion
    plain, specs, repeats = block_kinds(config), block_specs(config), passes(config)
    kinds = plain if kinds is None else kinds
    numbers, used = Counter(kinds), Counter[str]()
    for kind, times in zip(kinds, repeats, strict=True):
        used[kind] += times
    parts = [Part("embedding", 1, 1, vocab_size * d, 0)]
    for kind, number in numbers.items():
        index = kinds.index(kind)
        spec = specs[index]
        parameters, flops = block_parameters(config, spec), block_flops(config, spec, seq_len)
        if recursion is not None and plain[index] != spec.kind:
            lora = block_lora_parameters(config, spec)
            parameters, flops = parameters + recursion.times * lora, flops + 2 * lora
        parts.append(Part(kind, number, used[kind], parameters, flops))
    tables = shared_tables(config)
    for name in dict.fromkeys(table.kind for table in tables):
        parameters = sum(table.parameters for table in tables if table.kind == name)
        parts.append(Part(f"tables of {name}", 1, 0, parameters, 0))
    if recursion is not None:
        parts.append(Part("loop", 1, recursion.times, *loop_counts(config)))
    head = 0 if config.tie_embeddings else vocab_size * d
    parts.append(Part("head", 1, 1, head + d, 2 * vocab_size * d))
    return parts
