"""A model's first weights from another run: the same model, or a recursive one made from its blocks
(Relaxed Recursive Transformers, arXiv 2410.20672, section 3.2).

The source's blocks between the target's prelude and coda stand for its loop: at pass b, block k of
K replaces block b K + k. ``stepwise`` keeps K of them equally spaced, ``lower`` the first K,
``average`` the mean over passes; the low-rank differences start from the truncated singular value
decomposition of what each pass lost.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from data_prep.errors import UserError
from pretrain.config import InitializeConfig
from pretrain.models.blocks import block_specs
from pretrain.models.depth_lora import DepthLoRA
from pretrain.models.language_model import LanguageModel, build_model


def initialize_from(model: LanguageModel, config: InitializeConfig) -> None:
    """Overwrite ``model``'s weights; what the source does not have keeps its own start. Raises
    UserError where the source does not fit."""
    from pretrain.checkpoint import check_files, find_checkpoint, load_weights, read_state

    checkpoint = find_checkpoint(Path(config.checkpoint))
    check_files(checkpoint)
    state = read_state(checkpoint)
    if state.vocab_size != model.vocab_size:
        raise UserError(
            f"initialize.checkpoint {checkpoint} has a vocabulary of {state.vocab_size}, the model "
            f"one of {model.vocab_size}"
        )
    source = build_model(state.model_config, state.vocab_size, seed=0, dtype=model.context.dtype)
    load_weights(checkpoint, source)
    fill_from(model, source, config, str(checkpoint))


@torch.no_grad()
def fill_from(
    model: LanguageModel, source: LanguageModel, config: InitializeConfig, where: str
) -> None:
    """:func:`initialize_from` a model at hand; ``where`` names it in messages."""
    recursion = model.model_config.recursion
    if source.recursion is not None and recursion is not None:
        raise UserError(f"{where} holds a recursive model; expected one without a loop")
    prelude = 0 if recursion is None else recursion.prelude
    coda = 0 if recursion is None else recursion.coda
    times = 1 if recursion is None else recursion.times
    looped = len(model.blocks) - prelude - coda
    middle = len(source.blocks) - prelude - coda
    lora = recursion is not None and recursion.lora_rank > 0 and config.lora == "svd"
    if (config.method == "average" or lora or recursion is None) and middle != looped * times:
        raise UserError(
            f"{where} has {len(source.blocks)} blocks; {prelude} + {times} x {looped} + {coda} = "
            f"{prelude + times * looped + coda} were expected"
        )
    if middle < looped:
        raise UserError(f"{where} has {middle} blocks for the loop, expected at least its {looped}")
    if lora and model.context.tensor_size > 1:
        raise UserError(
            "initialize.lora=svd needs tensor parallel size 1: no process has the whole matrices"
        )
    chosen = _chosen(config.method, looped, middle, times)
    _check_same_blocks(model, source, [
        *([i] for i in range(prelude)),
        *([prelude + i for i in group] for group in chosen),
        *([len(source.blocks) - coda + i] for i in range(coda)),
    ], where)  # fmt: skip

    ends = (model.embedding, source.embedding), (model.final_norm, source.final_norm)
    heads = () if model.model_config.tie_embeddings else ((model.head, source.head),)
    for target, origin in (*ends, *heads):
        _copy(target, [origin], where)
    for k, target in enumerate(model.blocks):
        if k < prelude:
            _copy(target, [source.blocks[k]], where)
        elif k < prelude + looped:
            _copy(target, [source.blocks[prelude + i] for i in chosen[k - prelude]], where)
            if lora:
                replaced = [source.blocks[prelude + b * looped + k - prelude] for b in range(times)]
                _low_rank(target, replaced)
        else:
            _copy(target, [source.blocks[k - len(model.blocks)]], where)


def _chosen(method: str, looped: int, middle: int, times: int) -> list[list[int]]:
    """For each block of the loop, the source's blocks (counted from the prelude) that make it."""
    if method == "lower":
        return [[k] for k in range(looped)]
    if method == "average":
        return [[b * looped + k for b in range(times)] for k in range(looped)]
    if looped == 1:
        return [[0]]
    return [[round(k * (middle - 1) / (looped - 1))] for k in range(looped)]


def _check_same_blocks(
    model: LanguageModel, source: LanguageModel, origins: list[list[int]], where: str
) -> None:
    wanted, there = block_specs(model.model_config), block_specs(source.model_config)
    for k, (spec, indices) in enumerate(zip(wanted, origins, strict=True)):
        for i in indices:
            if (there[i].mixer, there[i].config) != (spec.mixer, spec.config):
                raise UserError(
                    f"block {k} of the model is {spec.name} {spec.config}, but block {i} of "
                    f"{where} is {there[i].name} {there[i].config}"
                )


def _copy(target: nn.Module, origins: list[nn.Module], where: str) -> None:
    """Every parameter becomes the mean of the origins' of the same name."""
    values = [_by_name(origin) for origin in origins]
    for name, parameter in _by_name(target).items():
        if name.endswith((".lora_a", ".lora_b")):
            continue
        found = [v.get(name) for v in values]
        if any(f is None or f.shape != parameter.shape for f in found):
            shape = None if found[0] is None else tuple(found[0].shape)
            raise UserError(
                f"{where}: {name} is {shape}, expected {tuple(parameter.shape)}: hidden_size, mlp "
                "and block_norm must be the model's"
            )
        parameter.copy_(torch.stack([f for f in found if f is not None]).mean(0))


def _by_name(module: nn.Module) -> dict[str, Tensor]:
    """Parameters by the name they have without low-rank differences around them."""
    return {name.replace(".inner.", "."): p for name, p in module.named_parameters()}


def _low_rank(target: nn.Module, replaced: list[nn.Module]) -> None:
    """lora_b lora_a of each pass: the best approximation of (replaced - shared) of that rank."""
    for name, module in target.named_modules():
        if not isinstance(module, DepthLoRA):
            continue
        rank = module.lora_a.shape[1]
        module.lora_a.zero_()
        module.lora_b.zero_()
        for depth, origin in enumerate(replaced):
            whole = origin.get_parameter(f"{name.replace('.inner.', '.')}.weight")
            lost = (whole - module.weight).to(torch.promote_types(whole.dtype, torch.float32))
            u, s, v = torch.linalg.svd(lost, full_matrices=False)
            r = min(rank, len(s))
            root = s[:r].sqrt()
            module.lora_b[depth, :, :r] = u[:, :r] * root
            module.lora_a[depth, :r] = root[:, None] * v[:r]
