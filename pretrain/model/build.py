"""Build this process's share of a model, with its initial values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from pretrain.common.errors import UserError
from pretrain.config import ModelConfig
from pretrain.model.language_model import LanguageModel
from pretrain.model.spec import block_specs
from pretrain.model.stages import split_into_stages
from pretrain.nn.parameters import fill_parameters
from pretrain.parallel.context import CellsOverSegments, ParallelContext, current_context
from pretrain.parallel.processes import groups


def padded_vocab_size(config: ModelConfig, tokenizer_vocab_size: int) -> int:
    """Return the embedding's rows: as configured, or the tokenizer's up to a multiple of 128."""
    return config.vocab_size or -(-tokenizer_vocab_size // 128) * 128


def build_model(
    config: ModelConfig,
    vocab_size: int,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    activation_checkpointing: str = "none",
    sequence_parallel: bool = False,
    context: ParallelContext | None = None,
) -> LanguageModel:
    """Build an initialised model, sharded only by tensor parallelism; the same for every layout.

    ``context``: that of this process unless given; without process groups the model is full.
    """
    if context is None:
        context = current_context(dtype, sequence_parallel=sequence_parallel)
    with torch.device("meta"):
        model = LanguageModel(
            config, vocab_size, context, activation_checkpointing=activation_checkpointing
        )
    for _ in fill_units(model, seed):
        pass
    return model


def fill_units(model: LanguageModel, seed: int) -> Iterator[nn.Module]:
    """Initialise a model that was built on the meta device.

    Each unit (embedding, block, loop, norm, head) is yielded when it has its values, before the
    next one takes memory.
    """
    for name, child in model.named_children():
        units = child.named_children() if child is model.blocks else [("", child)]
        for index, unit in units:
            prefix = f"{name}.{index}." if index else f"{name}."
            try:
                fill_parameters(unit, seed, prefix=prefix, device=model.context.device)
            except RuntimeError as error:
                if "allocate memory" not in str(error) and "out of memory" not in str(error):
                    raise
                size = sum(p.numel() * p.element_size() for p in unit.parameters())
                raise UserError(
                    f"{prefix.rstrip('.')} of the model has {size / 1e9:,.1f} GB of weights, more "
                    "than there is memory left for; choose a smaller model (vocab_size, "
                    "hidden_size), or divide it by parallel.tensor or parallel.pipeline"
                ) from None
            yield unit


def build_stages(
    config: ModelConfig,
    vocab_size: int,
    *,
    seed: int,
    seq_len: int,
    dtype: torch.dtype = torch.float32,
    activation_checkpointing: str = "none",
    sequence_parallel: bool = False,
    context_cells: CellsOverSegments = "chain",
    filled: Callable[[nn.Module, torch.dtype], None] | None = None,
) -> list[LanguageModel]:
    """Build this process's stages of an initialised model, as :func:`build_model` makes it.

    That is one stage, or one per part of a virtual pipeline; without a pipeline the full model.

    ``seq_len`` is that of the training batches' sequences; the FLOPs that stages are balanced by
    are counted for it. ``filled`` is called with each unit (embedding, block, ...) once it has its
    values, and the model's dtype.
    """
    models = empty_stages(
        config,
        vocab_size,
        seq_len=seq_len,
        dtype=dtype,
        activation_checkpointing=activation_checkpointing,
        sequence_parallel=sequence_parallel,
        context_cells=context_cells,
    )
    for model in models:
        for unit in fill_units(model, seed):
            if filled is not None:
                filled(unit, dtype)
    return models


def empty_stages(
    config: ModelConfig,
    vocab_size: int,
    *,
    seq_len: int,
    dtype: torch.dtype = torch.float32,
    activation_checkpointing: str = "none",
    sequence_parallel: bool = False,
    context_cells: CellsOverSegments = "chain",
) -> list[LanguageModel]:
    """Make the stages of :func:`build_stages` on the meta device: shapes without memory."""
    state = groups()
    count = 1 if state is None else state.get_pipeline_model_parallel_world_size()
    rank = 0 if state is None else state.get_pipeline_model_parallel_rank()
    parts = None if state is None else state.get_virtual_pipeline_model_parallel_world_size()
    context = current_context(
        dtype, sequence_parallel=sequence_parallel, context_cells=context_cells
    )
    stages = split_into_stages(config, vocab_size, seq_len, count * (parts or 1), "config")
    models = []
    for part, stage in enumerate(stages[rank::count]):
        with torch.device("meta"):
            model = LanguageModel(
                config,
                vocab_size,
                context,
                stage=stage,
                seq_len=seq_len,
                activation_checkpointing=activation_checkpointing,
            )
        model.vp_stage = None if parts is None else part
        models.append(model)
    return models


def split_like(
    stages: Sequence[LanguageModel], config: ModelConfig, vocab_size: int, seq_len: int, where: str
) -> list[LanguageModel]:
    """Make the stages of another model beside this process's ``stages``, on the meta device.

    They have the same blocks where both models have as many, so that these can be compared. Raises
    ConfigError, beginning with ``where``, for a model that is not as many stages.
    """
    context, state = stages[0].context, groups()
    own = stages[0].model_config
    alike = config.recursion is None is own.recursion
    if alike and len(block_specs(config, where)) == len(block_specs(own)):
        divided = [stage.stage for stage in stages]
    else:
        count = 1 if state is None else state.get_pipeline_model_parallel_world_size()
        rank = 0 if state is None else state.get_pipeline_model_parallel_rank()
        every = split_into_stages(config, vocab_size, seq_len, count * len(stages), where)
        divided = every[rank::count]
    with torch.device("meta"):
        return [
            LanguageModel(config, vocab_size, context, stage=stage, seq_len=seq_len)
            for stage in divided
        ]
