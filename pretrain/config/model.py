"""The settings of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pretrain.common.config_loader import setting


@dataclass
class MLPConfig:
    """The width is ``ratio`` times hidden_size, rounded up to ``multiple_of``, unless given."""

    kind: str = setting("swiglu", choices=("swiglu", "gelu", "none"))
    ratio: float = setting(8 / 3, above=0)
    multiple_of: int = setting(16, minimum=1)
    intermediate_size: int | None = setting(None, minimum=1)

    def width(self, hidden_size: int) -> int:
        """The number of inner channels."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return -int(-self.ratio * hidden_size // self.multiple_of) * self.multiple_of


@dataclass
class MoEConfig:
    """A mixture of SwiGLU experts instead of the MLP of all blocks but the first ``first_dense``.

    intermediate_size: inner channels of an expert, shared_intermediate_size: of one that every
    token goes through, 0 = none. score: of a token for an expert; normalize_top_k: the chosen ones'
    weights add up to 1, times ``weight_scale``.

    balance_weight: of the loss that is least when all experts have as many tokens (arXiv
    2101.03961); z_loss_weight: of the squared log-sum of the scores (arXiv 2202.08906);
    bias_update_rate: of a bias that only decides the choice and is moved after every step towards
    equal loads (arXiv 2408.15664), 0 = none. capacity_factor: tokens that an expert takes of a
    micro-batch, as a multiple of an equal share; the rest is dropped, and counted; null = no limit.
    """

    num_experts: int = setting(8, minimum=2)
    top_k: int = setting(2, minimum=1)
    intermediate_size: int = setting(512, minimum=1)
    shared_intermediate_size: int = setting(0, minimum=0)
    first_dense: int = setting(0, minimum=0)
    score: str = setting("softmax", choices=("softmax", "sigmoid"))
    normalize_top_k: bool = True
    weight_scale: float = setting(1.0, above=0)
    balance_weight: float = setting(1e-3, minimum=0)
    z_loss_weight: float = setting(0.0, minimum=0)
    bias_update_rate: float = setting(0.0, minimum=0)
    capacity_factor: float | None = setting(None, above=0)


@dataclass
class RecursionConfig:
    """The pattern's blocks between ``prelude`` and ``coda`` form a loop, gone through ``times``.

    Looped blocks (arXiv 2410.20672): lora_rank: rank of a low-rank difference that every projection
    and MLP matrix of the loop has at each pass, 0 = none.

    Recurrent depth (arXiv 2502.05171): sampling: ``poisson`` draws the number of passes anew for
    each training step, log-normal Poisson with mean ``times`` (plus one); backprop_last:
    passes that gradients go through, null = all; adapter: every pass starts from a linear layer of
    (state, the prelude's output); state_init: what the first pass starts from, the prelude's output
    or (with an adapter) ``random`` or ``zeros``; state_std: of ``random``, cut at 3 of them;
    normalize_state: the final norm also before the coda.

    Universal Transformer (arXiv 1807.03819): step_signal: added to the state before each pass, a
    sinusoid of the pass's number or a learned vector (positions are the mixers' own affair);
    halting: adaptive computation time (arXiv 1603.08983), a token's output is the mean of its
    states weighted by its halting probabilities, up to where they exceed ``halting_threshold``
    (its later states still serve other tokens); ponder_weight: of the number of passes in the
    training loss. Blocks are pre-norm, where the paper's are post-norm.
    """

    prelude: int = setting(0, minimum=0)
    coda: int = setting(0, minimum=0)
    times: int = setting(2, minimum=1)
    lora_rank: int = setting(0, minimum=0)
    sampling: str = setting("fixed", choices=("fixed", "poisson"))
    backprop_last: int | None = setting(None, minimum=1)
    adapter: bool = False
    state_init: str = setting("input", choices=("input", "random", "zeros"))
    state_std: float = setting(0.632, above=0)
    normalize_state: bool = False
    step_signal: str = setting("none", choices=("none", "sinusoidal", "learned"))
    halting: bool = False
    halting_threshold: float = setting(0.99, above=0, maximum=1)
    ponder_weight: float = setting(0.01, minimum=0)


@dataclass
class ModelConfig:
    """pattern: the blocks, see pretrain/model/pattern.py; mixers: settings by name, only what
    differs from a mixer's own defaults (an entry with ``kind: NAME`` makes a variant of mixer NAME
    under a name of its own); vocab_size: null = the tokenizer's, rounded up to a multiple of 128;
    block_norm: ``pre``, or ``sandwich``, which also normalises the stream behind mixer and MLP;
    scale_embeddings: multiply embeddings by sqrt(hidden_size); dropout: the probability with which
    training leaves out a channel of what a mixer or an MLP adds to the stream, or of an embedding;
    moe: see MoEConfig; recursion: see RecursionConfig.

    depth_scaled_init: output projections start smaller by sqrt(2 x blocks passed) (GPT-2).
    mup_base_hidden_size: maximal-update parametrization (arXiv 2203.03466, table 8): what was tuned
    at this width holds at others. With m = hidden_size / base, matrices of the blocks start smaller
    by sqrt(m) and learn m times slower, and logits are divided by m; let the number of heads grow,
    not their width. logit_softcap: c tanh(logit / c) (arXiv 2408.00118). z_loss_weight: of the
    squared log-sum of a token's logits in the training loss (arXiv 2204.02311).
    """

    pattern: str
    hidden_size: int = setting(minimum=1)
    mixers: dict[str, Any] = field(default_factory=dict)
    mlp: MLPConfig = field(default_factory=MLPConfig)
    vocab_size: int | None = setting(None, minimum=1)
    tie_embeddings: bool = True
    norm_eps: float = setting(1e-6, above=0)
    init_std: float = setting(0.02, above=0)
    depth_scaled_init: bool = False
    mup_base_hidden_size: int | None = setting(None, minimum=1)
    logit_softcap: float | None = setting(None, above=0)
    z_loss_weight: float = setting(0.0, minimum=0)
    block_norm: str = setting("pre", choices=("pre", "sandwich"))
    scale_embeddings: bool = False
    dropout: float = setting(0.0, minimum=0, below=1)
    moe: MoEConfig | None = None
    recursion: RecursionConfig | None = None
