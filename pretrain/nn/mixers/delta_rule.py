"""The base of DeltaNet, Gated DeltaNet and DeltaProduct; see :mod:`pretrain.ops.delta_rule`.

q, k, v = SiLU(conv(W x)), q and k L2-normalised per head; beta = sigmoid(W_b x), doubled where
negative eigenvalues are allowed; log decay = -exp(A_log) softplus(W_a x + dt_bias); the output is
RMSNorm(o) per head, times SiLU(W_g x) where there is a gate, through W_o.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from pretrain.data.sequences import Sequences
from pretrain.nn.linear import (
    ReadsSharedInput,
    column_input,
    column_linear,
    group_linear,
    head_shared,
    row_linear,
)
from pretrain.nn.maximal_update import Role
from pretrain.nn.mixers.base import LayerContext, Mixer, State, accumulation_dtype, heads
from pretrain.nn.mixers.conversion import QKVO, Conversion, slow_decay, value_sizes
from pretrain.nn.mixers.mitigations import DELTA_RULE, recur
from pretrain.nn.mixers.parts import (
    add_short_convolutions,
    convolution_states,
    convolve,
    decay_rate_init,
    delta_rule_flops,
    gate_parameter,
    l2_norm,
    matrix_state,
    softplus_decay,
    time_step_init,
)
from pretrain.nn.mixers.sizes import integral
from pretrain.nn.parameters import constant, replicated_parameter
from pretrain.ops import delta_rule
from pretrain.ops.elementwise.rms_norm import rms_norm, rms_norm_silu_gate
from pretrain.ops.shared.recomputation import recomputed


class DeltaRuleMixer(Mixer):
    """The delta rule, as a mixer.

    Its state is the convolutions' last inputs, and S ``[N, H, K, V]`` in float32. A subclass says
    by ``output_gate`` and :meth:`decays`, and by its settings ``num_householder``, which of the
    family it is, or another recurrence by :meth:`recurrence`.
    """

    over_time = "ops"
    conversion = Conversion(value_sizes, QKVO, slow_decay)

    output_gate: ClassVar[bool] = True
    q_proj: ReadsSharedInput
    k_proj: ReadsSharedInput

    def __init__(self, config: Any, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel = context.hidden_size, context.parallel
        self.num_heads = parallel.local(config.num_heads, "num_heads")
        self.substeps = self.householder(config)
        self.mitigable = DELTA_RULE if self.decays(config) else DELTA_RULE[1:]
        qk_heads = qk_heads_of(config)
        k_dim, v_dim = qk_heads * config.head_dim, config.num_heads * config.value_dim
        k_steps, v_steps = self.substeps * k_dim, self.substeps * v_dim
        self.qk_heads = max(qk_heads // parallel.tensor_size, 1)
        if qk_heads == config.num_heads:
            self.q_proj = column_linear(parallel, d, k_dim, context.std)
            self.k_proj = column_linear(parallel, d, k_steps, context.std)
        else:
            # With the model they become more too, unless all heads share one.
            role: Role = "bottleneck" if qk_heads == 1 else "hidden"
            keys: Any = (parallel, d, qk_heads, config.head_dim, context.std, "num_qk_heads")
            self.q_proj, self.k_proj = (group_linear(*keys, role=role) for _ in "qk")
        self.v_proj = column_linear(parallel, d, v_steps, context.std)
        if self.output_gate:
            self.g_proj = column_linear(parallel, d, v_dim, context.std)
        if self.decays(config):
            self.a_proj = column_linear(parallel, d, config.num_heads, context.std, precise=True)
            self.A_log = gate_parameter(parallel, (self.num_heads,), decay_rate_init())
            self.dt_bias = gate_parameter(parallel, (self.num_heads,), time_step_init)
        self.b_proj = column_linear(
            parallel, d, self.substeps * config.num_heads, context.std, precise=True
        )
        self.o_proj = row_linear(parallel, v_dim, d, context.output_std)
        size = self.qk_heads * config.head_dim
        widths = {"q": size, "k": self.substeps * size, "v": v_steps // parallel.tensor_size}
        shared = "qk" if qk_heads < parallel.tensor_size else ""
        add_short_convolutions(self, parallel, widths, config.conv_size, shared=shared)
        self.norm = replicated_parameter(parallel, (config.value_dim,), constant(1.0))

    @classmethod
    def householder(cls, config: Any) -> int:
        """Return the Householder steps per token."""
        return int(getattr(config, "num_householder", 1))

    @classmethod
    def decays(cls, config: Any) -> bool:
        """Return whether there is a decay, one number per head."""
        return True

    @override
    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel, self)
        new_state: State = {}
        q, k, v = (
            convolve(self, name, getattr(self, f"{name}_proj")(x), sequences, state, new_state)
            for name in "qkv"
        )
        q = heads_of(q, self.qk_heads, 1)
        k, v = heads_of(k, self.qk_heads, self.substeps), self._steps(v)
        beta = self._steps(self.b_proj(x).transpose(0, 1))[..., 0]
        beta = beta.to(accumulation_dtype(self.parallel.dtype)).sigmoid() * (
            1 + self.config.allow_neg_eigval
        )
        log_decay = None
        if self.decays(self.config):
            log_decay = softplus_decay(self.a_proj(x), self.A_log, self.dt_bias).transpose(0, 1)
        self.note(beta=beta)
        y = self.recurrence(
            q,
            k,
            v,
            beta,
            log_decay,
            state=state,
            new_state=new_state,
            sequences=sequences,
            chunk_size=self.config.chunk_size,
        )
        norm = head_shared(self.norm, self.parallel)
        if self.output_gate:
            y = self.gated_norm(y, norm, heads(self.g_proj(x), self.num_heads))
        else:
            y = rms_norm(y, norm, self.config.norm_eps)
        return self.o_proj(y.flatten(2).transpose(0, 1)), new_state

    def recurrence(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None,
        **options: Any,
    ) -> Tensor:
        """Return the recurrence's output ``[B, T, H, V]``; its final state goes into new_state."""
        return recur(
            self,
            delta_rule,
            self._of_all_heads(l2_norm(q)),
            self._of_all_heads(l2_norm(k)),
            v,
            beta,
            log_decay=log_decay,
            num_householder=self.substeps,
            **options,
        )

    def _of_all_heads(self, x: Tensor) -> Tensor:
        """Give each head the query or key ``[B, T, H, K]`` that it shares."""
        times = self.num_heads // self.qk_heads
        return x if times == 1 else x.repeat_interleave(times, 2)

    def gated_norm(self, y: Tensor, norm: Tensor, gate: Tensor) -> Tensor:
        """Return y ``[B, T, H, V]`` normalised, times what the output gate makes of ``gate``."""
        return rms_norm_silu_gate(y, norm, gate, self.config.norm_eps)

    def _steps(self, x: Tensor) -> Tensor:
        """Split ``[B, T, H * n * dim]`` into ``[B, T * n, H, dim]``.

        A head's sub-steps are adjacent, so that heads can be sharded.
        """
        return heads_of(x, self.num_heads, self.substeps)

    @override
    def init_state(self, batch_size: int) -> State:
        config = self.config
        return {
            **convolution_states(self, self.parallel, batch_size, "qkv"),
            "recurrent": matrix_state(
                self.parallel, batch_size, self.num_heads, config.head_dim, config.value_dim
            ),
        }

    @classmethod
    @override
    def check(cls, config: Any, hidden_size: int) -> None:
        integral(config.head_dim * config.expand_v, "head_dim * expand_v")
        if config.num_heads % qk_heads_of(config):
            raise ValueError(
                f"num_qk_heads is {config.num_qk_heads}, which does not divide num_heads "
                f"{config.num_heads}"
            )
        steps = cls.householder(config)
        if config.chunk_size < steps:
            raise ValueError(
                f"chunk_size is {config.chunk_size}, expected at least num_householder = {steps}"
            )

    @classmethod
    @override
    def sharded_counts(cls, config: Any, hidden_size: int) -> dict[str, int]:
        shared = qk_heads_of(config)
        more = {} if shared == config.num_heads else {"num_qk_heads": shared}
        return {"num_heads": config.num_heads, **more}

    @classmethod
    @override
    def num_parameters(cls, config: Any, hidden_size: int) -> int:
        n, h = cls.householder(config), config.num_heads
        k_dim, v_dim = qk_heads_of(config) * config.head_dim, h * config.value_dim
        gate, decay = cls.output_gate, cls.decays(config)
        widths = k_dim * (1 + n) + v_dim * (n + 1 + gate) + h * (n + decay)
        convolutions = config.conv_size * (k_dim * (1 + n) + v_dim * n)
        return hidden_size * widths + convolutions + 2 * h * decay + config.value_dim

    @classmethod
    @override
    def flops_per_token(cls, config: Any, hidden_size: int, seq_len: int) -> int:
        n, h = cls.householder(config), config.num_heads
        k_dim, v_dim = qk_heads_of(config) * config.head_dim, h * config.value_dim
        widths = k_dim * (1 + n) + v_dim * (n + 1 + cls.output_gate) + h * (n + cls.decays(config))
        return 2 * hidden_size * widths + h * delta_rule_flops(
            config.head_dim, config.value_dim, config.chunk_size, n
        )

    @classmethod
    @override
    def state_bytes(cls, config: Any, hidden_size: int, seq_len: int) -> int:
        k, v, h, n = config.head_dim, config.value_dim, config.num_heads, cls.householder(config)
        inputs = qk_heads_of(config) * k * (1 + n) + h * n * v
        return 4 * h * k * v + 2 * max(config.conv_size - 1, 0) * inputs


def qk_heads_of(config: Any) -> int:
    """Return the heads of queries and keys, which several heads may share."""
    return int(getattr(config, "num_qk_heads", None) or config.num_heads)


def heads_of(x: Tensor, num_heads: int, steps: int) -> Tensor:
    """Split ``[B, T, H * steps * dim]`` into ``[B, T * steps, H, dim]``."""
    return recomputed(_heads_of, x, num_heads, steps)


def _heads_of(x: Tensor, num_heads: int, steps: int) -> Tensor:
    return x.unflatten(-1, (num_heads, steps, -1)).transpose(2, 3).flatten(1, 2)
