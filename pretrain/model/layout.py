"""Limits that a model's layers set to a layout, and the checks that need them."""

from __future__ import annotations

import torch

from pretrain.common.config_loader import ConfigError
from pretrain.config import ModelConfig, PrefixConfig, RunConfig, checks
from pretrain.config.checks import ModelLimits
from pretrain.model.float8 import check_float8_layout
from pretrain.model.spec import BlockSpec, block_specs, check_model
from pretrain.model.stages import most_stages
from pretrain.nn.mixers.base import SHAREABLE, LayerContext
from pretrain.parallel.context import ParallelContext

ENDLESS = 2**40  # tokens, more than any window


def model_limits(config: ModelConfig, where: str) -> ModelLimits:
    """Return what the layers of a model allow of a layout. Raises ConfigError."""
    counts: dict[str, int] = {}
    for spec in block_specs(config, where):
        for name, count in spec.mixer.sharded_counts(spec.config, config.hidden_size).items():
            if count > 1 or name not in SHAREABLE:
                counts[f"model.mixers.{spec.name}: {name}"] = count
    if config.moe is not None and config.moe.shared_intermediate_size:
        counts["model.moe: shared inner channels"] = config.moe.shared_intermediate_size
    if config.mlp.kind != "none" and (config.moe is None or config.moe.first_dense):
        counts["model.mlp: inner channels"] = config.mlp.width(config.hidden_size)
    if config.vocab_size is not None:
        counts["model.vocab_size"] = config.vocab_size
    most, units = most_stages(config, where)
    return ModelLimits(counts, most, units)


def check_layout(config: RunConfig, count: int, where: str) -> None:
    """Check whether a run fits ``count`` processes.

    Raises ConfigError, or UserError for the number of processes, with what would work.
    """
    check_model(config.model, where)
    check_causal(config.model, where, config.data.prefix)
    if config.train.carry_state:
        _check_states(config.model, where)
    _check_cells(config, where)
    _check_handed_on(config, where)
    checks.check_layout(config, model_limits(config.model, where), count, where)
    if config.train.precision == "fp8":
        check_float8_layout(config.model, config.parallel.tensor, where)


def _check_states(config: ModelConfig, where: str) -> None:
    """Raise ConfigError where a layer's state grows, which rows cannot carry on for ever."""
    for spec in block_specs(config, where):
        if _grows(spec, config.hidden_size):
            raise ConfigError(
                f"{where}: train.carry_state is true, but the state of mixer '{spec.name}' grows "
                "with the text; expected layers with a state of one size, such as swa"
            )


def _grows(spec: BlockSpec, hidden_size: int) -> bool:
    """Return whether the state of a block's mixer grows with the text."""
    short, long = (
        spec.mixer.state_bytes(spec.config, hidden_size, n) for n in (ENDLESS, 2 * ENDLESS)
    )
    return short != long


def _check_handed_on(config: RunConfig, where: str) -> None:
    """Raise ConfigError where the next segment could not tell how large a layer's state is.

    One whose state grows says so by packing it along its first axis, as attention's keys are.
    """
    size, hidden_size = config.parallel.context, config.model.hidden_size
    if size == 1:
        return
    for spec in block_specs(config.model, where):
        if spec.mixer.over_time != "state" or not _grows(spec, hidden_size):
            continue
        context = LayerContext(hidden_size, 0.0, 0.0, ParallelContext(), number=spec.number)
        with torch.device("meta"):
            state = spec.mixer(spec.config, context).init_state(1)
        if all(tensor.shape[:1] == (1,) for tensor in state.values()):
            raise ConfigError(
                f"{where}: parallel.context is {size}, but the state of mixer '{spec.name}' grows "
                "with the text along another axis than its first; expected parallel.context 1, or "
                "what grows packed along the first axis, with a select_state and, where joining is "
                "more than torch.cat, a join_states of its own (docs/add-a-layer.md)"
            )


def check_tensor_parallel(config: ModelConfig, size: int, where: str) -> None:
    """Raise ConfigError unless ``size`` tensor-parallel processes can share the model."""
    checks.check_tensor_parallel(model_limits(config, where), size, where)


def check_causal(config: ModelConfig, where: str, prefix: PrefixConfig | None = None) -> None:
    """Raise ConfigError where a layer sees the tokens that the model is to predict.

    With ``prefix`` those of a document's prefix are not predicted from what sees them.
    """
    specs = block_specs(config, where)
    ahead = {spec.name: spec.mixer.sees_ahead(spec.config) for spec in specs}
    if prefix is not None and not any(ahead.values()):
        raise ConfigError(
            f"{where}: data.prefix is set, but no layer sees a prefix; expected one that does, "
            "such as jrt with a prefix_length, or data.prefix null"
        )
    for name, tokens in ahead.items():
        if prefix is not None and 0 < tokens < prefix.tokens:
            raise ConfigError(
                f"{where}: data.prefix.tokens is {prefix.tokens}, but mixer '{name}' sees a "
                f"document's first {tokens} tokens at once; expected at most {tokens}, or a larger "
                "prefix_length"
            )
        if prefix is None and tokens:
            raise ConfigError(
                f"{where}: mixer '{name}' sees a document's first {tokens} tokens at once, among "
                "them the next one, which it is to predict; expected one that sees none ahead, "
                "such as prefix_length: 0, or a loss that leaves them out, as of data.prefix"
            )


def _check_cells(config: RunConfig, where: str) -> None:
    """Raise ConfigError where context-parallel processes cannot share cells by their heads."""
    parallel = config.parallel
    if parallel.context == 1 or parallel.context_cells != "heads":
        return
    for spec in block_specs(config.model, where):
        if spec.mixer.over_time == "cells":
            heads = spec.config.num_heads // parallel.tensor
            if heads < parallel.context:
                raise ConfigError(
                    f"{where}: parallel.context_cells is heads, but {spec.name} has {heads} heads "
                    f"on a process, fewer than parallel.context = {parallel.context}; expected "
                    "chain or auto"
                )
