"""Models on this process's share of a layout, with their initial values."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from pretrain.config import ModelConfig
from pretrain.model.language_model import LanguageModel
from pretrain.model.stages import split_into_stages
from pretrain.nn.linear import ParallelContext, fill_parameters


def padded_vocab_size(config: ModelConfig, tokenizer_vocab_size: int) -> int:
    """The embedding's rows: as configured, or the tokenizer's rounded up to a multiple of 128."""
    return config.vocab_size or -(-tokenizer_vocab_size // 128) * 128


def parallel_context(
    dtype: torch.dtype,
    *,
    hidden_size: int | None = None,
    sequence_parallel: bool = False,
) -> ParallelContext:
    """The context of a model on this process; process groups must exist. ``hidden_size`` is what
    stages of a pipeline send each other. Parameters are made on torch's default device."""
    tensor_size = parallel_state.get_tensor_model_parallel_world_size()
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    parts = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    megatron = TransformerConfig(
        num_layers=stages * (parts or 1),  # required there, as are the heads; not used by us
        hidden_size=hidden_size or tensor_size,
        num_attention_heads=tensor_size,
        tensor_model_parallel_size=tensor_size,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=parts,
        # Two messages between the same two processes in one batch get mixed up.
        batch_p2p_comm=parts is None,
        overlap_p2p_comm=parts is not None,
        # gloo may still be sending an output that was freed.
        deallocate_pipeline_outputs=torch.cuda.is_available(),
        sequence_parallel=sequence_parallel and tensor_size > 1,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,
    )
    return ParallelContext(megatron=megatron, dtype=dtype)


def build_model(
    config: ModelConfig,
    vocab_size: int,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    activation_checkpointing: str = "none",
    sequence_parallel: bool = False,
) -> LanguageModel:
    """An initialised model, whole but for tensor parallelism; the same whatever the layout."""
    context = parallel_context(dtype, sequence_parallel=sequence_parallel)
    with torch.device("meta"):
        model = LanguageModel(
            config, vocab_size, context, activation_checkpointing=activation_checkpointing
        )
    for _ in fill_units(model, seed):
        pass
    return model


def fill_units(model: LanguageModel, seed: int) -> Iterator[nn.Module]:
    """Initialise a model that was built on the meta device: each embedding, block, loop, norm and
    head is yielded when it has its values, before the next one takes memory."""
    for name, child in model.named_children():
        units = child.named_children() if child is model.blocks else [("", child)]
        for index, unit in units:
            fill_parameters(unit, seed, prefix=f"{name}.{index}." if index else f"{name}.")
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
    filled: Callable[[nn.Module], None] | None = None,
) -> list[LanguageModel]:
    """This process's stages of an initialised model, as :func:`build_model` makes it: one, or
    one for each part of a virtual pipeline; without a pipeline the whole model.

    ``seq_len``: of the training batches' sequences, also what the mixers' FLOPs, by which stages
    are divided, are counted at; ``filled`` is called with each unit (embedding, block, ...) when it
    has its values.
    """
    models = empty_stages(
        config,
        vocab_size,
        seq_len=seq_len,
        dtype=dtype,
        activation_checkpointing=activation_checkpointing,
        sequence_parallel=sequence_parallel,
    )
    for model in models:
        for unit in fill_units(model, seed):
            if filled is not None:
                filled(unit)
    return models


def empty_stages(
    config: ModelConfig,
    vocab_size: int,
    *,
    seq_len: int,
    dtype: torch.dtype = torch.float32,
    activation_checkpointing: str = "none",
    sequence_parallel: bool = False,
) -> list[LanguageModel]:
    """:func:`build_stages` on the meta device: shapes without memory."""
    count = parallel_state.get_pipeline_model_parallel_world_size()
    rank = parallel_state.get_pipeline_model_parallel_rank()
    parts = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    context = parallel_context(
        dtype, hidden_size=config.hidden_size, sequence_parallel=sequence_parallel
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
