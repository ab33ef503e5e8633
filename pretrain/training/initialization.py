"""Initialization from another run: the same model, or a recursive one made from its blocks.

The recursive one follows Relaxed Recursive Transformers (arXiv 2410.20672, section 3.2). The
source's blocks between the target's prelude and coda stand for its loop: at pass b, block k of K
replaces block b K + k. ``stepwise`` keeps K of them equally spaced, ``lower`` the first K,
``average`` the mean over passes; the low-rank differences start from the truncated singular value
decomposition of what each pass lost.

Mixers that ``initialize.convert`` names begin as attention layers of the source, or anew; see
:mod:`pretrain.training.conversion`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from pretrain.common.errors import UserError
from pretrain.config import InitializeConfig, RecursionConfig
from pretrain.config.conversion import kept_pattern, written_pattern
from pretrain.model.build import build_model
from pretrain.model.language_model import LanguageModel
from pretrain.model.spec import block_specs
from pretrain.nn.mixers.conversion import own_parameters
from pretrain.training.conversion import Taken, low_rank, put, taken_of, values_of


def initialize_from(
    stages: Sequence[LanguageModel], config: InitializeConfig, tokenizer_sha256: str | None = None
) -> None:
    """Overwrite the weights of a model, given as this process's ``stages`` of it.

    Weights that the source does not have keep their initial values. Raises UserError where the
    source does not fit, or was trained with another tokenizer.
    """
    from pretrain.checkpoint.state import check_files, load_weights, read_state
    from pretrain.run_directory import find_checkpoint

    try:
        checkpoint = find_checkpoint(Path(config.checkpoint))
        check_files(checkpoint)
        state = read_state(checkpoint)
    except UserError as error:
        raise UserError(f"initialize.checkpoint: {error}") from None
    if tokenizer_sha256 is not None and state.tokenizer_sha256 != tokenizer_sha256:
        raise UserError(
            f"initialize.checkpoint {checkpoint} was trained with another tokenizer "
            f"({state.tokenizer_sha256[:12]}...) than the data's ({tokenizer_sha256[:12]}...); "
            f"prepare the data with tokenizer: {{path: {checkpoint}}}"
        )
    vocab_size, dtype = stages[0].vocab_size, stages[0].context.dtype
    if state.vocab_size != vocab_size:
        raise UserError(
            f"initialize.checkpoint {checkpoint} has a vocabulary of {state.vocab_size}, the model "
            f"one of {vocab_size}"
        )
    source = build_model(state.model_config, state.vocab_size, seed=0, dtype=dtype)
    load_weights(checkpoint, source)
    # Blocks are matched between full models; a stage takes its blocks from one.
    full = stages[0]
    if not (full.stage.first and full.stage.last):
        full = build_model(full.model_config, vocab_size, seed=0, dtype=dtype)
        _copy_by_name(stages, full)
    fill_from(full, source, config, str(checkpoint))
    if full is not stages[0]:
        _copy_by_name([full], *stages)


@torch.no_grad()
def _copy_by_name(origins: Sequence[nn.Module], *targets: nn.Module) -> None:
    values = {name: p for origin in origins for name, p in origin.named_parameters()}
    for target in targets:
        for name, parameter in target.named_parameters():
            if name in values:
                parameter.copy_(values[name])


def _loop(model: LanguageModel) -> RecursionConfig | None:
    """Return the settings of a model's loop but those of its loss alone."""
    loop = model.model_config.recursion
    return loop and dataclasses.replace(loop, exit_weight=0.0, exit_distill=False)


@torch.no_grad()
def fill_from(
    model: LanguageModel, source: LanguageModel, config: InitializeConfig, where: str
) -> None:
    """Fill ``model`` from ``source``; ``where`` names the source in messages."""
    recursion = model.model_config.recursion
    _check_same_settings(model, source, where)
    if source.recursion is not None:
        if _loop(source) != _loop(model):
            raise UserError(
                f"{where} holds a recursive model; expected one without a loop, or the same loop"
            )
        recursion = None  # the same model, loop included
        _copy(model.recursion, [source.recursion], where)
    prelude = 0 if recursion is None else recursion.prelude
    coda = 0 if recursion is None else recursion.coda
    times = 1 if recursion is None else recursion.times
    looped = len(model.blocks) - prelude - coda
    middle = len(source.blocks) - prelude - coda
    lora = recursion is not None and recursion.lora_rank > 0 and config.lora == "svd"
    chosen_by = "lower" if recursion is None else config.method
    if (chosen_by == "average" or lora or recursion is None) and middle != looped * times:
        raise UserError(
            f"{where} has {len(source.blocks)} blocks; {prelude} + {times} x {looped} + {coda} = "
            f"{prelude + times * looped + coda} were expected"
        )
    if middle < looped:
        raise UserError(f"{where} has {middle} blocks for the loop, expected at least its {looped}")
    chosen = _chosen(chosen_by, looped, middle, times)
    origins = [
        *([i] for i in range(prelude)),
        *([prelude + i for i in group] for group in chosen),
        *([len(source.blocks) - coda + i] for i in range(coda)),
    ]
    _check_kept(model, source, config, where)
    taken = _check_blocks(model, source, origins, config, where)

    _copy(model.embedding, [source.embedding], where)
    _copy(model.final_norm, [source.final_norm], where)
    put(
        model.tables,
        [own_parameters(source.tables)],
        where,
        begin_anew=tuple(f"{name}." for name in config.convert),
    )
    if not model.model_config.tie_embeddings:
        tied = source.model_config.tie_embeddings
        _copy(model.head, [source.embedding if tied else source.head], where)
    for k, target in enumerate(model.blocks):
        how = taken[k]
        found = [values_of(target, source.blocks[i], how) for i in origins[k]]
        put(target, found, where, begin_anew=() if how == "whole" else ("mixer.",))
        if lora and prelude <= k < prelude + looped:
            replaced = [source.blocks[prelude + b * looped + k - prelude] for b in range(times)]
            low_rank(target, [values_of(target, block, how) for block in replaced], model.context)


def _chosen(method: str, looped: int, middle: int, times: int) -> list[list[int]]:
    """Return the source's blocks that make each block of the loop, counted from the prelude."""
    if method == "lower":
        return [[k] for k in range(looped)]
    if method == "average":
        return [[b * looped + k for b in range(times)] for k in range(looped)]
    if looped == 1:
        return [[0]]
    return [[round(k * (middle - 1) / (looped - 1))] for k in range(looped)]


def _check_same_settings(model: LanguageModel, source: LanguageModel, where: str) -> None:
    wanted, there = model.model_config, source.model_config
    names = ("block_norm", "block_norms", "norm", "norm_eps", "scale_embeddings")
    scales = ("embedding_scale", "residual_scale", "logit_scale")
    for name in ("hidden_size", *names, *scales):
        if getattr(wanted, name) != getattr(there, name):
            raise UserError(
                f"{where} has model.{name} {getattr(there, name)}, expected "
                f"{getattr(wanted, name)}, the model's"
            )
    widths = [(c.mlp.kind, c.mlp.width(c.hidden_size)) for c in (there, wanted)]
    if widths[0] != widths[1] and (widths[0][0], widths[1][0]) != ("none", "none"):
        raise UserError(
            f"{where} has an MLP of kind and width {widths[0]}, expected {widths[1]}, the model's"
        )
    if wanted.tie_embeddings and not there.tie_embeddings:
        raise UserError(f"{where} has an untied head, which model.tie_embeddings=true would drop")


def _check_kept(
    model: LanguageModel, source: LanguageModel, config: InitializeConfig, where: str
) -> None:
    """Check that a model whose pattern is set has the one that ``initialize.keep`` stands for."""
    if config.keep is None or model.recursion is not None or not config.convert:
        return
    expected = kept_pattern(source.model_config, next(iter(config.convert)), config, "run")
    found = [spec.name for spec in block_specs(model.model_config)]
    if found != expected:
        raise UserError(
            f"model.pattern is '{model.model_config.pattern}', but initialize.keep {config.keep} "
            f"makes '{written_pattern(expected)}' of {where}; expected one of them to be left out"
        )


def _check_blocks(
    model: LanguageModel,
    source: LanguageModel,
    origins: list[list[int]],
    config: InitializeConfig,
    where: str,
) -> list[Taken]:
    """Return how the mixer of each block begins. Raises UserError where a source does not fit."""
    wanted, there = block_specs(model.model_config), block_specs(source.model_config)
    return [
        taken_of(
            k, spec, {i: there[i] for i in indices}, model.model_config.hidden_size, config, where
        )
        for k, (spec, indices) in enumerate(zip(wanted, origins, strict=True))
    ]


def _copy(target: nn.Module | None, origins: Sequence[nn.Module], where: str) -> None:
    """Set every parameter to the mean of the origins' of the same name."""
    assert target is not None
    put(target, [own_parameters(origin) for origin in origins], where)
