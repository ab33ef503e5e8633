"""A block of the language model: a mixer and an MLP, or experts, on the residual stream."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.config import ModelConfig
from pretrain.data.sequences import Sequences
from pretrain.model.block_states import MLP_SHIFT, StateOwner, WithMLPState, split_state
from pretrain.model.depth_lora import set_depth
from pretrain.model.spec import BlockSpec, block_specs
from pretrain.nn.channel_mixing import ChannelMixing
from pretrain.nn.dropout import DropAt
from pretrain.nn.mixers import LayerContext, State
from pretrain.nn.mixers.base import without_states
from pretrain.nn.mixers.over_segments import mix
from pretrain.nn.mlp import MLP, make_mlp
from pretrain.nn.moe import MoE
from pretrain.nn.norm import NORMS
from pretrain.nn.parameters import (
    constant,
    replicated_parameter,
    swapped_parameters,
    used_on_local_tokens,
)
from pretrain.ops.shared.recomputation import recomputing
from pretrain.parallel.segments import Handover

FirstValues = dict[str, Tensor]


class Block(nn.Module):
    """A residual block of a mixer and, unless the MLP kind is none, an MLP.

    Pre-norm: ``x + mixer(norm(x))``, then ``x + mlp(norm(x))``. Sandwich: the same, and each sum is
    normalised. Post: ``x + norm(mixer(x))``, then ``x + norm(mlp(x))``. Sum: ``norm(x +
    mixer(x))``, then ``norm(x + mlp(x))``. What is added to x is multiplied by ``residual_scale``.
    With ``scales`` sums are ``c x + d f``, of learned scalars.
    """

    def __init__(
        self, spec: BlockSpec, config: ModelConfig, context: LayerContext, scales: bool = False
    ):
        super().__init__()
        d, parallel, norm = config.hidden_size, context.parallel, NORMS[config.norm]
        self.mixer_norm = norm(d, config.norm_eps, parallel)
        self.mixer = spec.mixer(spec.config, context)
        self.mlp: MLP | ChannelMixing | MoE | None = None
        if config.mlp.kind != "none":
            self.mlp_norm = norm(d, config.norm_eps, parallel)
            if spec.moe is not None:
                self.mlp = MoE(spec.moe, context)
            else:
                self.mlp = make_mlp(config.mlp.kind, config.mlp.width(d), context)
        self.index, self.sandwich = context.index, spec.norm == "sandwich"
        self.post, self.sum = spec.norm == "post", spec.norm == "sum"
        self.scale = config.residual_scale
        # Who takes, or hands on, what the first block of a kind computes.
        self.kind, self.later = spec.name, spec.later
        self.hands_on = bool(spec.mixer.first_values(spec.config, d))
        if self.sandwich:
            self.mixer_post_norm = norm(d, config.norm_eps, parallel)
            if self.mlp is not None:
                self.mlp_post_norm = norm(d, config.norm_eps, parallel)
        self.residual_scales: nn.Parameter | None = None
        if scales:
            weights = replicated_parameter(
                parallel, (4 if self.mlp is not None else 2,), constant(1.0)
            )
            self.residual_scales = used_on_local_tokens(weights, parallel)

    @property
    def states(self) -> StateOwner:
        """Return who handles the states of this block: its mixer, unless the MLP has one too."""
        if isinstance(self.mlp, ChannelMixing):
            return WithMLPState(self.mixer, self.mlp)
        return self.mixer

    def _add(self, x: Tensor, y: Tensor, sum_number: int) -> Tensor:
        """Return the residual stream with what the mixer (0) or the MLP (1) adds."""
        if self.residual_scales is None:
            return x + y if self.scale == 1 else torch.add(x, y, alpha=self.scale)
        stream, added = self.residual_scales[2 * sum_number : 2 * sum_number + 2]
        return stream * x + (added if self.scale == 1 else added * self.scale) * y

    def forward(
        self,
        x: Tensor,
        *,
        sequences: Sequences | None = None,
        state: State | None = None,
        drop: DropAt | None = None,
        depth: int = 0,
        handover: Handover | None = None,
        first: FirstValues | None = None,
    ) -> tuple[Tensor, State]:
        """Run x ``[T, B, d]`` through the block; returns the same shape and the block's state.

        ``drop`` applies dropout to what mixer and MLP add, at pass ``depth`` of a loop.
        ``handover``: what a segment of a row has received, where the block may run again.
        ``first``: as for mixers, see :meth:`.Mixer.first_values`.
        """
        handover = handover or Handover()
        last: Tensor | None = None
        if state is not None and isinstance(self.mlp, ChannelMixing):
            state, last = split_state(state)
        inner = x if self.post or self.sum else self.mixer_norm(x)
        y, state = mix(self.mixer, inner, sequences, state, handover, first)
        y = self.mixer_norm(y) if self.post else y
        x = self._add(x, y if drop is None else drop(y, (self.index, depth, 0)), 0)
        if self.sandwich:
            x = self.mixer_post_norm(x)
        elif self.sum:
            x = self.mixer_norm(x)
        if self.mlp is not None:
            inner = x if self.post or self.sum else self.mlp_norm(x)
            if isinstance(self.mlp, ChannelMixing):
                y, last = self.mlp(inner, sequences=sequences, last=last)
                state = state if last is None else {**state, MLP_SHIFT: last}
            else:
                y = self.mlp(inner)
            y = self.mlp_norm(y) if self.post else y
            x = self._add(x, y if drop is None else drop(y, (self.index, depth, 1)), 1)
            if self.sandwich:
                x = self.mlp_post_norm(x)
            elif self.sum:
                x = self.mlp_norm(x)
        return x, state


def make_blocks(
    config: ModelConfig, local: range, context: LayerContext, tables: nn.ModuleDict
) -> nn.ModuleList:
    """Make the ``local`` blocks of a model, each at its number in the pattern.

    ``tables`` are what blocks share, by kind and name; ``context`` is that of all of them.
    """
    specs, blocks, recursion = block_specs(config), nn.ModuleList(), config.recursion
    scaled = range(0)
    if recursion is not None and recursion.residual_scales:
        scaled = range(recursion.prelude, len(specs) - recursion.coda)
    for index, spec in enumerate(specs):
        if index not in local:
            blocks.append(nn.Identity())  # so that blocks keep their numbers
            continue
        shared: Any = dict(tables[spec.name].named_children()) if spec.name in tables else {}
        here = dataclasses.replace(context, index=index, number=spec.number, tables=shared)
        blocks.append(Block(spec, config, here, scales=index in scaled))
    return blocks


def run_block(
    block: Block,
    x: Tensor,
    sequences: Sequences | None,
    depth: int,
    drop: DropAt | None,
    activation_checkpointing: str = "none",
    state: State | None = None,
    with_state: bool = False,
    firsts: dict[str, FirstValues] | None = None,
) -> tuple[Tensor, State | None]:
    """Run x ``[T, B, d]`` through a block at pass ``depth`` of a loop, from ``state`` if any.

    ``activation_checkpointing``: what the backward pass computes again, as in TrainConfig.
    ``firsts``: what the first blocks of each kind have handed on; this block's is added. Returns
    the same shape, and the state behind it where ``with_state`` asks for it.
    """
    first = None
    if block.hands_on and firsts is not None:
        first = firsts[block.kind] if block.later else {}
    arguments = (block, x, sequences, depth, drop, state, with_state, first)
    if activation_checkpointing == "block":
        found: Any = checkpoint(_run, *arguments, Handover(), use_reentrant=False)
    elif activation_checkpointing == "selective":
        with recomputing(swapped_parameters(block)):
            found = _run(*arguments)
    else:
        found = _run(*arguments)
    y, new, handed = found
    if handed is not None and firsts is not None:
        firsts[block.kind] = handed
    return y, new


def _run(
    block: Block,
    x: Tensor,
    sequences: Sequences | None,
    depth: int,
    drop: DropAt | None,
    state: State | None,
    with_state: bool,
    first: FirstValues | None,
    handover: Handover | None = None,
) -> tuple[Tensor, State | None, FirstValues | None]:
    """Return the block's output, the state if wanted, and what the first of its kind hands on.

    That is an output as all others are: a checkpointed block may run again.
    """
    set_depth(block, depth)
    given = None if first is None else dict(first)
    with nullcontext() if with_state else without_states():
        y, new = block(
            x,
            sequences=sequences,
            state=state,
            drop=drop,
            depth=depth,
            handover=handover,
            first=given,
        )
    return y, new if with_state else None, given
