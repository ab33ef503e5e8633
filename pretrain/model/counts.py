"""Parameters, FLOPs and states of a model, counted from its settings: pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from pretrain.config import ModelConfig, RecursionConfig
from pretrain.model.depth_lora import linear_shapes
from pretrain.model.shared import shared_tables
from pretrain.model.spec import BlockSpec, block_specs, passes
from pretrain.nn.mixers import LayerContext
from pretrain.nn.mlp import make_mlp, mlp_matrices, mlp_parameters, mlp_state_bytes
from pretrain.nn.moe import MoE
from pretrain.parallel.context import ParallelContext


def block_parameters(config: ModelConfig, spec: BlockSpec) -> int:
    """Count the parameters of one block: mixer, MLP and norms, but no low-rank differences."""
    d = config.hidden_size
    norms = (1 if config.mlp.kind == "none" else 2) * (1 + (spec.norm == "sandwich"))
    norms *= norm_parameters(config)
    mlp = mlp_parameters(config.mlp.kind, d, config.mlp.width(d))
    if spec.moe is not None:
        mlp = MoE.num_parameters(spec.moe, d)
    later = spec.mixer.added_later(spec.config, d)[0] if spec.later else 0
    return spec.mixer.num_parameters(spec.config, d) + later + mlp + norms


def block_flops(config: ModelConfig, spec: BlockSpec, seq_len: int) -> int:
    """Return the matrix-multiply FLOPs of one token's forward pass through one block."""
    d = config.hidden_size
    mlp = 2 * mlp_matrices(config.mlp.kind, d, config.mlp.width(d))
    if spec.moe is not None:
        mlp = MoE.flops_per_token(spec.moe, d)
    later = spec.mixer.added_later(spec.config, d)[1] if spec.later else 0
    return spec.mixer.flops_per_token(spec.config, d, seq_len) + later + mlp


def block_state_bytes(config: ModelConfig, spec: BlockSpec, seq_len: int) -> int:
    """Return the bytes of one sequence's state in one block after ``seq_len`` tokens."""
    mlp = mlp_state_bytes(config.mlp.kind, config.hidden_size) if spec.moe is None else 0
    return spec.mixer.state_bytes(spec.config, config.hidden_size, seq_len) + mlp


def training_flops_by_block(config: ModelConfig, seq_len: int) -> list[float]:
    """Count the forward and backward FLOPs per token of every block of the pattern, all passes.

    The head is excluded, and so is what a loop has besides its blocks.
    """
    recursion = config.recursion
    flops = []
    for spec, times in zip(block_specs(config), passes(config), strict=True):
        through = times
        if times > 1 and recursion is not None and recursion.backprop_last is not None:
            through = min(times, recursion.backprop_last)
        flops.append(block_flops(config, spec, seq_len) * (times + 2.0 * through))
    if recursion is not None and recursion.coda:
        coda = slice(len(flops) - recursion.coda, None)
        flops[coda] = [cost * outputs(recursion) for cost in flops[coda]]
    return flops


def outputs(recursion: RecursionConfig | None) -> int:
    """Return how often training computes coda and head: of every pass, where exits are learned."""
    return 1 if recursion is None or recursion.exit_weight == 0 else recursion.times


def block_lora_parameters(
    config: ModelConfig, spec: BlockSpec, *, mixer_alone: bool = False
) -> int:
    """Count the parameters of one pass's low-rank differences of one block in the loop.

    They are rank (d_in + d_out) for every linear layer, whose shapes are read off layers that are
    built without memory. ``mixer_alone`` leaves out those of the MLP or experts.
    """
    recursion = config.recursion
    if recursion is None or recursion.lora_rank == 0:
        return 0
    with torch.device("meta"):
        context = LayerContext(config.hidden_size, 0.0, 0.0, ParallelContext(), number=spec.number)
        layers: list[nn.Module] = [spec.mixer(spec.config, context)]
        if mixer_alone:
            pass
        elif spec.moe is not None:
            layers.append(MoE(spec.moe, context))
        elif config.mlp.kind != "none":
            width = config.mlp.width(config.hidden_size)
            layers.append(make_mlp(config.mlp.kind, width, context))
    total = sum(sum(shape) for layer in layers for shape in linear_shapes(layer))
    return recursion.lora_rank * total


def loop_counts(config: ModelConfig) -> tuple[int, int]:
    """Count what a loop has besides its blocks: parameters, and FLOPs per token of one pass."""
    d, recursion = config.hidden_size, config.recursion
    if recursion is None:
        return 0, 0
    adapter = 2 * d * d * recursion.adapter
    learned = recursion.times * d * (recursion.step_signal == "learned")
    sums = 1 if config.mlp.kind == "none" else 2
    blocks = len(block_specs(config)) - recursion.prelude - recursion.coda
    scales = 2 * sums * blocks * recursion.residual_scales
    parameters = adapter + learned + scales + (d + 1) * recursion.halting
    return parameters, 2 * (adapter + d * recursion.halting)


def norm_parameters(config: ModelConfig) -> int:
    """Count the parameters of one norm on the residual stream."""
    return config.hidden_size * (2 if config.norm == "layer" else 1)


def recomputed_flops(config: ModelConfig, seq_len: int) -> tuple[int, int]:
    """Count the forward FLOPs per token that ``activation_checkpointing: block`` computes again.

    Returns those outside a loop, and those of one pass through it. torch stops recomputing at the
    last tensor that the backward pass needs: where nothing follows an MLP but the residual sum,
    that is the input of its last product, which is not done again. Blocks without an MLP are
    counted in full.
    """
    flops = [_recomputed(config, spec, seq_len) for spec in block_specs(config)]
    if config.recursion is None:
        return sum(flops), 0
    inside = slice(config.recursion.prelude, len(flops) - config.recursion.coda)
    return sum(flops) - sum(flops[inside]), sum(flops[inside])


def _recomputed(config: ModelConfig, spec: BlockSpec, seq_len: int) -> int:
    full = block_flops(config, spec, seq_len)
    dense = config.mlp.kind != "none" and spec.moe is None
    if not dense or spec.norm != "pre" or config.dropout > 0:
        return full
    return full - 2 * config.hidden_size * config.mlp.width(config.hidden_size)


@dataclass(frozen=True)
class ModelCounts:
    """The counts of a model; see :func:`count_model`.

    Attributes:
        parameters: all parameters, shared ones once.
        embedding_parameters: those of the embedding and the head.
        flops_per_token: forward matrix-multiply FLOPs.
        state_bytes: recurrent or cached state of one sequence.
        loop_flops: forward FLOPs per token of one pass through the loop of a recursive model.
        times: passes through the loop.
        backprop_last: passes that gradients go through, None for all.
        recomputed: see :func:`recomputed_flops`.
        idle_parameters: those of the experts that a token does not go through.
        teacher_flops: forward FLOPs of the teacher that training runs beside the model.
        loop_blocks: the first block in the loop and the first after it, None without a loop.
        exit_flops: forward FLOPs per token of the output of one earlier pass in training.
    """

    parameters: int
    embedding_parameters: int
    flops_per_token: int
    state_bytes: int
    loop_flops: int = 0
    times: int = 1
    backprop_last: int | None = None
    recomputed: tuple[int, int] = (0, 0)
    idle_parameters: int = 0
    loop_blocks: tuple[int, int] | None = None
    exit_flops: int = 0
    teacher_flops: int = 0

    def describe(self) -> str:
        """Return the sizes of the model in words: parameters, those of a token, and loops."""
        parts = [f"{self.embedding_parameters:,} in embeddings"]
        if self.idle_parameters:
            parts.append(f"a token goes through {self.parameters - self.idle_parameters:,}")
        found = f"{self.parameters:,} parameters ({', '.join(parts)})"
        if self.loop_blocks is None:
            return found
        first, end = self.loop_blocks
        which = f"block {first}" if end - first == 1 else f"blocks {first} to {end - 1}"
        return f"{found}, {self.times} passes through {which}"

    def training_flops(self, times: float | None = None) -> float:
        """Return forward and backward FLOPs per token, with ``times`` passes through the loop.

        None means the configured number. Backward is twice forward, over the passes that gradients
        go through. A teacher beside the model is counted as if it ran in every step.
        """
        times = self.times if times is None else times
        through = times if self.backprop_last is None else min(times, self.backprop_last)
        outside = self.flops_per_token - self.times * self.loop_flops
        exits = 3 * self.exit_flops * max(times - 1, 0)
        own = 3 * outside + self.loop_flops * (times + 2 * through) + exits
        return own + self.teacher_flops

    def hardware_flops(self, times: float | None = None) -> float:
        """Add what activation checkpointing of blocks computes again to :meth:`training_flops`."""
        passes = self.times if times is None else times
        through = passes if self.backprop_last is None else min(passes, self.backprop_last)
        outside, inside = self.recomputed
        return self.training_flops(times) + outside + through * inside


def count_model(config: ModelConfig, vocab_size: int, seq_len: int) -> ModelCounts:
    """Count a model from its settings alone, for sequences of ``seq_len`` tokens."""
    d, specs, recursion = config.hidden_size, block_specs(config), config.recursion
    embedding = vocab_size * d * (1 if config.tie_embeddings else 2)
    parameters = (
        embedding + norm_parameters(config) + sum(block_parameters(config, spec) for spec in specs)
    )
    parameters += sum(table.parameters for table in shared_tables(config))
    flops = [block_flops(config, spec, seq_len) for spec in specs]
    states = [block_state_bytes(config, spec, seq_len) for spec in specs]
    repeats, loop_flops, total = passes(config), 0, sum(flops)
    loop_blocks, exit_flops = None, 0
    if recursion is not None:
        loop_blocks = recursion.prelude, len(specs) - recursion.coda
        inside = slice(*loop_blocks)
        lora = sum(block_lora_parameters(config, spec) for spec in specs[inside])
        beside, beside_flops = loop_counts(config)
        parameters += beside + recursion.times * lora
        loop_flops = sum(flops[inside]) + beside_flops + 2 * lora
        total += recursion.times * loop_flops - sum(flops[inside])
        if recursion.exit_weight > 0:
            exit_flops = 2 * vocab_size * d + sum(flops[inside.stop :])
    return ModelCounts(
        parameters=parameters,
        embedding_parameters=embedding,
        flops_per_token=2 * vocab_size * d + total,
        state_bytes=sum(n * b for n, b in zip(repeats, states, strict=True)),
        loop_flops=loop_flops,
        times=1 if recursion is None else recursion.times,
        backprop_last=None if recursion is None else recursion.backprop_last,
        recomputed=recomputed_flops(config, seq_len),
        idle_parameters=sum(
            3 * d * (spec.moe.num_experts - spec.moe.top_k) * spec.moe.intermediate_size
            for spec in specs
            if spec.moe is not None
        ),
        loop_blocks=loop_blocks,
        exit_flops=exit_flops,
    )
