"""Mixture of experts in the place of an MLP: every token goes to a few of many (arXiv 1701.06538).

Token-choice routing, shared experts (arXiv 2401.06066), a load-balancing loss (arXiv 2101.03961) or
a bias that only chooses (arXiv 2408.15664). Experts of one process are computed by one grouped
matrix product; with experts sharded over processes, tokens travel by megatron-core's dispatcher.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import MoEConfig
from pretrain.nn.mixers.base import LayerContext
from pretrain.nn.mlp import MLP
from pretrain.nn.parameters import (
    ParameterInfo,
    constant,
    describe,
    expert_matrices,
    matrix_parameter,
    used_on_local_tokens,
)
from pretrain.ops.elementwise.gating import sigmoid_gate, swiglu
from pretrain.ops.shared.recomputation import recomputed, recomputing
from pretrain.ops.shared.watching import is_backward_pass


class MoE(nn.Module):
    """The layer ``y = shared(x) + sum over the top_k experts e of weight_e(x) SwiGLU_e(x)``."""

    def __init__(self, config: MoEConfig, context: LayerContext):
        super().__init__()
        self.config, self.parallel, d = config, context.parallel, context.hidden_size
        self.seq_len = context.seq_len
        router = matrix_parameter(
            self.parallel, (config.num_experts, d), context.std, None, role="output"
        )
        self.router = used_on_local_tokens(router, self.parallel)
        width = config.intermediate_size
        self.gate_up_proj = expert_matrices(
            self.parallel, (config.num_experts, d, 2 * width), context.std
        )
        self.down_proj = expert_matrices(
            self.parallel, (config.num_experts, width, d), context.output_std
        )
        self.num_local = self.gate_up_proj.shape[0]
        if config.bias_update_rate > 0:
            bias = torch.empty(config.num_experts, dtype=torch.float32, device=router.device)
            self.bias = nn.Parameter(bias, requires_grad=False)
            describe(self.bias, ParameterInfo(constant(0.0)))
        if config.shared_intermediate_size:
            self.shared = MLP("swiglu", config.shared_intermediate_size, context)
        if config.shared_gate:
            gate = matrix_parameter(self.parallel, (1, d), context.std, None, role="output")
            self.shared_gate = used_on_local_tokens(gate, self.parallel)
        self._dispatcher: Any = None
        # Tokens of each expert since the last line of the log, and of the step for the bias.
        self._load: Tensor | None = None
        # Of the last tokens; and of the row that they are a segment of, which balancing goes by.
        self.last_load: Tensor | None = None
        self.row_load: Tensor | None = None
        self._seen: Tensor | None = None
        self._dropped: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, B, d]`` to the same shape; under sequence parallelism T is local tokens."""
        tokens = x.flatten(0, 1)
        weights, chosen, balance = self._route(tokens)
        kept, factor = None, self.config.capacity_factor
        if factor is not None and self.training and not x.is_meta:
            kept = self._within_capacity(chosen.view(*x.shape[:2], -1), factor).flatten(0, 1)
            self._count(dropped=(~kept).sum())
        if self.num_local < self.config.num_experts:
            y = self._dispatched(tokens, weights, chosen, kept)
        else:
            y = self._sorted(tokens, weights, chosen, kept)
        if balance is not None:
            y = _WithLoss.apply(y, balance)
        y = y.view(x.shape)
        if not self.config.shared_intermediate_size:
            return y
        shared = self.shared(x)
        if self.config.shared_gate:
            shared = sigmoid_gate(shared, F.linear(x, self.shared_gate))
        return y + shared

    def _route(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return each token's weights ``[N, top_k]``, their experts, and the balancing loss.

        Weights are in float32 or wider. The loss, in training only, is summed over tokens.
        """
        config, k = self.config, self.config.top_k
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        with recomputing():  # so that no wider copy of the tokens is kept
            logits = F.linear(recomputed(Tensor.to, tokens, dtype), self.router.to(dtype))
        scores = logits.softmax(-1) if config.score == "softmax" else logits.sigmoid()
        wanted = scores + self.bias if config.bias_update_rate > 0 else scores
        chosen = wanted.detach().topk(k, dim=-1).indices
        if chosen.is_meta:  # without values: evenly
            chosen = torch.arange(chosen.numel()).view(-1, k) % config.num_experts
        weights = scores.gather(-1, chosen)
        if config.normalize_top_k:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
        weights = weights * config.weight_scale
        load = torch.bincount(chosen.flatten(), minlength=config.num_experts)
        self._count(load=load)
        self.last_load = load
        if not (self.training and torch.is_grad_enabled()):
            return weights, chosen, None
        load = load if self.row_load is None else self.row_load
        return weights, chosen, self._balance(logits, scores, load)

    def _within_capacity(self, chosen: Tensor, factor: float) -> Tensor:
        """Return which of the choices ``[T, B, top_k]`` fit their expert: bool, in their shape.

        An expert has room for the first ones of a sequence, ``factor`` times an equal share, so no
        token is dropped for what comes after it or in another sequence.
        """
        experts, (tokens, rows, k) = self.config.num_experts, chosen.shape
        length = tokens if self.seq_len is None or tokens % self.seq_len else self.seq_len
        room = math.ceil(factor * k * length / experts - 1e-6)  # 1.05 x 6000 / 10 is 630
        taken = torch.zeros((tokens, rows, experts), dtype=torch.int32, device=chosen.device)
        taken.scatter_(2, chosen, 1)
        by_sequence = taken.view(-1, length, rows, experts)
        number = by_sequence.cumsum(1, dtype=torch.int32).view_as(taken)
        return number.gather(2, chosen) <= room

    def _balance(self, logits: Tensor, scores: Tensor, load: Tensor) -> Tensor | None:
        """Compute the load-balancing loss and the router's z-loss, summed over tokens.

        The first is the number of experts x sum of (share of the choices x mean score), over all
        tokens of a micro-batch, whichever tensor-parallel or context-parallel rank has them.
        """
        config = self.config
        if config.balance_weight == 0 and config.z_loss_weight == 0:
            return None
        loss = config.z_loss_weight * logits.logsumexp(-1).square().sum()
        if config.balance_weight > 0:
            share = load.to(scores.dtype)
            if self.parallel.sequence_parallel:
                dist.all_reduce(share, group=self.parallel.group)
            if self.parallel.context_size > 1:
                dist.all_reduce(share, group=self.parallel.context_group)
            share = share / share.sum()
            if config.score == "sigmoid":
                scores = scores / scores.sum(-1, keepdim=True)
            loss = loss + config.balance_weight * config.num_experts * (scores @ share).sum()
        return loss

    def _count(self, load: Tensor | None = None, dropped: Tensor | None = None) -> None:
        """Count load and drops for log and bias, but not when a forward pass is recomputed."""
        if not self.training or is_backward_pass():
            return
        if load is not None:
            self._load = load if self._load is None else self._load + load
            self._seen = load if self._seen is None else self._seen + load
        if dropped is not None:
            self._dropped = dropped if self._dropped is None else self._dropped + dropped

    def _experts(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """Apply the local experts to tokens in their order, ``counts [local experts]`` of each."""
        gate, up = _grouped(tokens, self.gate_up_proj, counts).chunk(2, -1)
        return _grouped(swiglu(gate, up), self.down_proj, counts)

    def _sorted(
        self, tokens: Tensor, weights: Tensor, chosen: Tensor, kept: Tensor | None
    ) -> Tensor:
        k = self.config.top_k
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=self.config.num_experts)
        if kept is not None:
            order = order[kept.flatten()[order]]
            counts = torch.bincount(flat[order], minlength=self.config.num_experts)
        source = order // k
        results = self._experts(recomputed(_rows, tokens, source), counts)
        results = results * weights.flatten()[order, None].to(results.dtype)
        return torch.zeros_like(tokens).index_add(0, source, results)

    def _dispatched(
        self, tokens: Tensor, weights: Tensor, chosen: Tensor, kept: Tensor | None
    ) -> Tensor:
        if self._dispatcher is None:
            self._dispatcher = self._make_dispatcher()
        dispatcher = self._dispatcher
        shape = (len(tokens), self.config.num_experts)
        probabilities = torch.zeros(shape, dtype=weights.dtype, device=weights.device)
        probabilities = probabilities.scatter(1, chosen, weights)
        routing_map = torch.zeros(shape, dtype=torch.bool, device=weights.device)
        kept = torch.ones_like(chosen, dtype=torch.bool) if kept is None else kept
        routing_map = routing_map.scatter(1, chosen, kept)
        local, local_weights = dispatcher.dispatch_preprocess(tokens, routing_map, probabilities)
        for name in ("input_splits", "output_splits"):
            splits = getattr(dispatcher, name)
            if isinstance(splits, Tensor):  # on the CPU; from a GPU it has made them numbers
                setattr(dispatcher, name, splits.tolist())
        received, received_weights = dispatcher.token_dispatch(local, local_weights)
        received, counts, received_weights = dispatcher.dispatch_postprocess(
            received, received_weights
        )
        results = self._experts(received, counts.to(received.device))
        results = results * received_weights[:, None].to(results.dtype)
        results = dispatcher.token_combine(dispatcher.combine_preprocess(results))
        return dispatcher.combine_postprocess(results)

    def _make_dispatcher(self) -> Any:
        # Here, for exported models come without it.
        from pretrain.parallel.megatron import token_dispatcher, transformer_config

        config = self.config
        settings = dataclasses.replace(
            transformer_config(self.parallel),
            num_moe_experts=config.num_experts,
            moe_router_topk=config.top_k,
            moe_token_dispatcher_type="alltoall",
            # Each slot's size is only known when it is routed.
            moe_expert_capacity_factor=config.capacity_factor,
            expert_model_parallel_size=self.parallel.expert_size,
            expert_tensor_parallel_size=1,
        )
        first = self.parallel.expert_rank * self.num_local
        dispatcher, process_groups = token_dispatcher()
        return dispatcher(
            self.num_local,
            list(range(first, first + self.num_local)),
            settings,
            pg_collection=process_groups(),
        )

    def metrics(self) -> dict[str, float]:
        """Return and reset load and drops of the training tokens since the last call.

        ``expert_load_max`` is the busiest expert's load against the mean, on one process;
        ``dropped_tokens`` how many choices were dropped.
        """
        found = {}
        if self._load is not None:
            load = self._load.float()
            found["expert_load_max"] = float(load.max() / load.mean().clamp_min(1e-9))
            self._load = None
        if self._dropped is not None:
            found["dropped_tokens"], self._dropped = float(self._dropped), None
        return found

    @property
    def step_load(self) -> Tensor | None:
        """Return the choices of each expert in the step at hand, of this process's tokens."""
        return self._seen

    def forget_load(self) -> None:
        """Forget the load that the next :meth:`update_bias` would go by."""
        self._seen = None

    @torch.no_grad()
    def update_bias(self) -> None:
        """Update the load-balancing bias after an optimizer step; every process must call.

        Experts with less than the mean load become more likely to be chosen, the others less. The
        load is that of all processes, of this one where it is alone.
        """
        from pretrain.parallel.processes import groups

        seen, self._seen = self._seen, None
        if self.config.bias_update_rate == 0 or seen is None:
            return
        load, state = seen.to(torch.float32), groups()
        if state is not None:
            everyone = state.get_tensor_and_data_parallel_group(with_context_parallel=True)
            dist.all_reduce(load, group=everyone)
        elif dist.is_initialized():  # by the caller, for copies of the full model
            dist.all_reduce(load)
        self.bias.add_((load.mean() - load).sign(), alpha=self.config.bias_update_rate)

    @classmethod
    def num_parameters(cls, config: MoEConfig, hidden_size: int) -> int:
        """Return the number of all parameters, used by a token or not."""
        d, experts = hidden_size, config.num_experts
        matrices = 3 * d * (experts * config.intermediate_size + config.shared_intermediate_size)
        routers = (experts + config.shared_gate) * d
        return matrices + routers + experts * (config.bias_update_rate > 0)

    @classmethod
    def flops_per_token(cls, config: MoEConfig, hidden_size: int) -> int:
        """Return the matrix-multiply FLOPs of one token's forward pass."""
        width = config.top_k * config.intermediate_size + config.shared_intermediate_size
        return 2 * hidden_size * (3 * width + config.num_experts + config.shared_gate)


class _WithLoss(torch.autograd.Function):
    """The identity on y, which also passes a gradient of 1 to ``loss``.

    ``loss`` is a sum over tokens, like the model's before it is divided by their number.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_dtype, ctx.device = loss.dtype, loss.device
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.ones((), dtype=ctx.loss_dtype, device=ctx.device)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x[index]


def _grouped(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Multiply the first ``counts[0]`` rows of x ``[N, d_in]`` by ``weight[0]``, and so on."""
    if x.is_meta and len(x) % len(weight) == 0:  # evenly, in one operation
        return torch.bmm(x.view(len(weight), -1, x.shape[1]), weight).flatten(0, 1)
    if x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and x.device.type == "cpu"):
        return F.grouped_mm(x, weight, offs=counts.cumsum(0).to(torch.int32))
    parts = x.split(counts.tolist())
    return torch.cat([part @ w for part, w in zip(parts, weight, strict=True)])
