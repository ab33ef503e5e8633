"""embedding -> blocks -> norm -> head, written once with tensor-parallel layers."""

from __future__ import annotations

from typing import cast

import torch
import torch.utils.checkpoint
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from pretrain.config import ModelConfig
from pretrain.models.blocks import BlockSpec, block_specs
from pretrain.models.mixers import LayerContext, State
from pretrain.models.mlp import MLP
from pretrain.models.norm import RMSNorm
from pretrain.parallel.layers import (
    ParallelContext,
    column_input,
    column_linear,
    initialize_parameters,
    vocab_embedding,
)


class Block(nn.Module):
    """Pre-norm: ``x + mixer(norm(x))``, then ``x + mlp(norm(x))`` unless the MLP kind is none."""

    def __init__(self, spec: BlockSpec, config: ModelConfig, context: LayerContext):
        super().__init__()
        d, parallel = config.hidden_size, context.parallel
        self.mixer_norm = RMSNorm(d, config.norm_eps, parallel)
        self.mixer = spec.mixer(spec.config, context)
        self.mlp: MLP | None = None
        if config.mlp.kind != "none":
            self.mlp_norm = RMSNorm(d, config.norm_eps, parallel)
            self.mlp = MLP(config.mlp.kind, config.mlp.width(d), context)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None, state: State | None
    ) -> tuple[Tensor, State]:
        y, state = self.mixer(self.mixer_norm(x), cu_seqlens=cu_seqlens, state=state)
        x = x + y
        if self.mlp is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x, state


class LanguageModel(nn.Module):
    """A causal language model over packed sequences.

    Raises ConfigError where the settings do not fit each other.
    """

    model_type = ModelType.encoder_or_decoder  # what megatron-core's schedules ask for

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        context: ParallelContext,
        *,
        activation_checkpointing: str = "none",
    ):
        super().__init__()
        specs = block_specs(config)
        self.config: TransformerConfig = context.megatron  # the name megatron-core looks for
        self.model_config, self.vocab_size, self.context = config, vocab_size, context
        self.checkpoint_blocks = activation_checkpointing == "block"
        depth = (2 * len(specs)) ** -0.5 if config.depth_scaled_init else 1.0
        layer = LayerContext(config.hidden_size, config.init_std, config.init_std * depth, context)
        self.embedding = vocab_embedding(context, vocab_size, config.hidden_size, config.init_std)
        self.blocks = nn.ModuleList(Block(spec, config, layer) for spec in specs)
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps, context)
        if not config.tie_embeddings:
            self.head = column_linear(context, config.hidden_size, vocab_size, config.init_std)

    def set_input_tensor(self, tensor: object) -> None:
        """Called by megatron-core's schedules with the previous stage's output; there is none."""

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """tokens, targets ``[B, T]`` int64; with ``cu_seqlens`` B is 1 and sequences are packed.

        Returns each target's cross entropy ``[B, T]`` in nats, float32; without targets,
        the logits ``[B, T, vocab]`` (this process's part of the vocabulary).
        """
        logits, _ = self._logits(tokens, cu_seqlens, None)
        if targets is None:
            return logits.transpose(0, 1)
        wanted = targets.t().contiguous()
        return tensor_parallel.vocab_parallel_cross_entropy(logits.float(), wanted).t()

    def forward_with_state(
        self, tokens: Tensor, states: list[State] | None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, list[State]]:
        """Logits ``[B, T, vocab]`` and every block's state, to go on from where a call ended."""
        logits, states = self._logits(tokens, cu_seqlens, states)
        return logits.transpose(0, 1), states

    def _logits(
        self, tokens: Tensor, cu_seqlens: Tensor | None, states: list[State] | None
    ) -> tuple[Tensor, list[State]]:
        x = self.embedding(tokens)
        if not self.context.megatron.sequence_parallel:
            x = x.transpose(0, 1)
        new_states: list[State] = []
        for index, block in enumerate(self.blocks):
            if self.checkpoint_blocks and self.training and states is None:
                x, _ = torch.utils.checkpoint.checkpoint(
                    block, x, cu_seqlens, None, use_reentrant=False
                )
            else:
                x, state = block(x, cu_seqlens, None if states is None else states[index])
                new_states.append(state)
        x = column_input(self.final_norm(x), self.context)
        if self.model_config.tie_embeddings:
            return nn.functional.linear(x, cast(Tensor, self.embedding.weight)), new_states
        return self.head(x)[0], new_states


def padded_vocab_size(config: ModelConfig, tokenizer_vocab_size: int) -> int:
    """The embedding's rows: as configured, or the tokenizer's rounded up to a multiple of 128."""
    return config.vocab_size or -(-tokenizer_vocab_size // 128) * 128


def parallel_context(dtype: torch.dtype) -> ParallelContext:
    """The context of a model on this process; process groups must exist."""
    megatron = TransformerConfig(
        num_layers=1,  # required there, not used by us
        hidden_size=1,
        num_attention_heads=1,
        use_cpu_initialization=not torch.cuda.is_available(),
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
) -> LanguageModel:
    """An initialised model; the same whatever the layout of processes."""
    context = parallel_context(dtype)
    model = LanguageModel(
        config, vocab_size, context, activation_checkpointing=activation_checkpointing
    )
    initialize_parameters(model, seed)
    return model
