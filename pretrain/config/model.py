"""The settings of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pretrain.common.config_loader import Config, setting

BlockNorm = Literal["pre", "sandwich", "post", "sum"]


@dataclass
class MLPConfig(Config):
    """The feed-forward network of a block."""

    kind: Literal["swiglu", "gelu", "relu", "rwkv", "none"] = setting("swiglu")
    """SwiGLU (arXiv 2002.05202), two matrices with GELU or ReLU between them, RWKV-7's channel
    mixing (arXiv 2503.14456: two matrices with a squared ReLU between them, whose input is mixed
    with that of the token before; published with ``ratio: 4``), or no network at all."""
    ratio: float = setting(8 / 3, above=0)
    """Inner channels as a multiple of ``hidden_size``. With SwiGLU's third matrix 8/3 makes as many
    parameters as the customary 4 without it."""
    multiple_of: int = setting(16, minimum=1)
    """The number of inner channels is rounded up to a multiple of this."""
    intermediate_size: int | None = setting(None, minimum=1)
    """Inner channels; null: from ``ratio`` and ``multiple_of``."""

    def width(self, hidden_size: int) -> int:
        """Return the number of inner channels."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return -int(-self.ratio * hidden_size // self.multiple_of) * self.multiple_of


@dataclass
class MoEConfig(Config):
    """A mixture of SwiGLU experts instead of the MLP (arXiv 2101.03961)."""

    num_experts: int = setting(8, minimum=2)
    """Experts in a block, of which each token goes through ``top_k``."""
    top_k: int = setting(2, minimum=1)
    """Experts that a token goes through."""
    intermediate_size: int = setting(512, minimum=1)
    """Inner channels of an expert."""
    shared_intermediate_size: int = setting(0, minimum=0)
    """Inner channels of an expert that every token goes through; 0: there is none."""
    shared_gate: bool = False
    """Whether that expert's output is multiplied by a sigmoid, one for each token (Qwen2-MoE)."""
    first_dense: int = setting(0, minimum=0)
    """Blocks at the beginning of the model that keep their MLP."""
    score: Literal["softmax", "sigmoid"] = setting("softmax")
    """What makes a router's output a token's score for an expert."""
    normalize_top_k: bool = True
    """Whether the weights of a token's experts are divided by their sum."""
    weight_scale: float = setting(1.0, above=0)
    """Factor on the weights of a token's experts."""
    balance_weight: float = setting(1e-3, minimum=0)
    """Weight of the load-balancing loss, which is least when all experts have as many tokens of a
    micro-batch (arXiv 2101.03961)."""
    z_loss_weight: float = setting(0.0, minimum=0)
    """Weight of the squared log-sum-exp of the router's outputs in the loss (arXiv 2202.08906)."""
    bias_update_rate: float = setting(0.0, minimum=0)
    """Step of a bias that only decides the choice of experts and is moved after every optimizer
    step towards equal loads (arXiv 2408.15664); 0: there is none."""
    capacity_factor: float | None = setting(None, above=0)
    """Tokens of a sequence that an expert takes in training, as a multiple of an equal share: the
    first ones, whatever documents they are of. The rest is dropped, and counted in the metrics;
    null: no limit. Nothing is dropped in evaluation."""


@dataclass
class RecursionConfig(Config):
    """A loop over the pattern's blocks between ``prelude`` and ``coda``.

    Covers looped blocks with low-rank differences (arXiv 2410.20672), recurrent depth (arXiv
    2502.05171) and the Universal Transformer (arXiv 1807.03819).
    """

    prelude: int = setting(0, minimum=0)
    """Blocks before the loop, passed once."""
    coda: int = setting(0, minimum=0)
    """Blocks after the loop, passed once."""
    times: int = setting(2, minimum=1)
    """Passes through the loop; with ``sampling: poisson`` their mean in training."""
    lora_rank: int = setting(0, minimum=0)
    """Rank of a low-rank difference that every projection and MLP matrix of the loop has at each
    pass (arXiv 2410.20672); 0: all passes share all weights."""
    sampling: Literal["fixed", "poisson"] = setting("fixed")
    """Passes of a training step: always ``times``, or drawn from a log-normal Poisson distribution
    with mean ``times``, plus one (arXiv 2502.05171)."""
    backprop_last: int | None = setting(None, minimum=1)
    """Passes that gradients flow back through, counted from the last; null: all of them."""
    adapter: bool = False
    """Whether every pass starts from a linear layer of the state and the prelude's output."""
    state_init: Literal["input", "random", "zeros"] = setting("input")
    """What the first pass starts from: the prelude's output or, with an adapter, Gaussian noise or
    zeros."""
    state_std: float = setting(0.632, above=0)
    """Standard deviation of a ``random`` start, which is cut at three of them; sqrt(2/5) as
    published."""
    residual_scales: bool = False
    """Whether every residual sum in the loop, ``c x + d f(x)``, has two learned scalars, 1 at first
    and the same at every pass (arXiv 2111.05297)."""
    normalize_state: bool = False
    """Whether the final norm is applied before the coda too."""
    step_signal: Literal["none", "sinusoidal", "learned", "coordinate"] = setting("none")
    """What is added to the state before each pass: a sinusoid of the pass's number, a learned
    vector, or the sum of sinusoids of the pass's number and of the token's position in its document
    (arXiv 1807.03819). Only the last one has positions; the others leave them to the mixers."""
    position_offsets: int = setting(0, minimum=0)
    """With ``coordinate`` the largest number that a training sequence's positions may begin at; it
    is drawn for each sequence, so that positions of longer texts are trained too."""
    halting: bool = False
    """Adaptive computation time (arXiv 1603.08983): a token's output is the mean of its states
    weighted by its halting probabilities, up to where their sum exceeds ``halting_threshold``."""
    halting_state: Literal["carry", "copy"] = setting("carry")
    """What other tokens see of one whose output is complete, in later passes: its state, which is
    still computed, or a copy of its last one (arXiv 1807.03819)."""
    halting_threshold: float = setting(0.99, above=0, maximum=1)
    """Sum of halting probabilities beyond which a token's output is complete."""
    ponder_weight: float = setting(0.01, minimum=0)
    """Weight of the number of passes in the training loss, with ``halting``."""
    exit_weight: float = setting(0.0, minimum=0)
    """Weight in the training loss of what every earlier pass would predict, for tokens that leave
    the loop early: each pass but the last goes through coda, norm and head too. 0.1 keeps the last
    pass good (arXiv 2410.20672)."""
    exit_distill: bool = False
    """Whether earlier passes learn the last pass's distribution, by the KL divergence from it,
    instead of the next token; the last pass learns nothing from them."""


@dataclass
class ModelConfig(Config):
    """A language model: embedding, blocks of a mixer and an MLP, norm and head."""

    pattern: str
    """The mixers of all blocks in a line, such as ``6*(3*gdn attn)``."""
    hidden_size: int = setting(minimum=1)
    """The model's width: channels of the residual stream."""
    mixers: dict[str, Any] = field(default_factory=dict)
    """Settings of mixers by their name in the pattern, only what differs from the defaults. An
    entry with ``kind: NAME`` makes a variant of mixer NAME under a name of its own."""
    mlp: MLPConfig = field(default_factory=MLPConfig)
    """The feed-forward network of every block."""
    vocab_size: int | None = setting(None, minimum=1)
    """Rows of the embedding; null: the tokenizer's ids, rounded up to a multiple of 128."""
    tie_embeddings: bool = True
    """Whether the output head shares the embedding's weights."""
    norm: Literal["rms", "layer"] = setting("rms")
    """Whether blocks, and the model before its head, normalise by the root of the mean square
    (arXiv 1910.07467), or by mean and variance, with a bias (arXiv 1607.06450)."""
    norm_eps: float = setting(1e-6, above=0)
    """Added to the mean square, or the variance, in these norms."""
    init_std: float = setting(0.02, above=0)
    """Standard deviation of the Gaussian that matrices are initialised with."""
    depth_scaled_init: bool = False
    """Whether output projections start smaller by sqrt(2 x blocks passed) (GPT-2)."""
    mup_base_hidden_size: int | None = setting(None, minimum=1)
    """Maximal-update parametrization (arXiv 2203.03466, table 8): what was tuned at this width
    holds at others. With m = hidden_size / base, matrices of the blocks start smaller by sqrt(m)
    and learn m times slower (with Muon, whose updates grow with the matrix, by sqrt(m)), logits are
    divided by m, and routers and halting start smaller by m. Weight decay times learning rate stays
    the same. Heads become more, not wider: sizes of a head that are not given are those at the base
    width. ``python -m pretrain coordinates`` checks a model; null: off."""
    logit_softcap: float | None = setting(None, above=0)
    """c of logits c tanh(logit / c) (arXiv 2408.00118); null: off."""
    z_loss_weight: float = setting(0.0, minimum=0)
    """Weight of the squared log-sum-exp of a token's logits in the training loss (arXiv
    2204.02311)."""
    block_norm: BlockNorm = setting("pre")
    """Where blocks normalise: the input of mixer and MLP; with ``sandwich`` each sum with their
    output too; with ``post`` their output alone, before it is added (arXiv 2501.00656); with
    ``sum`` each sum alone (arXiv 1706.03762)."""
    block_norms: dict[str, BlockNorm] = field(default_factory=dict)
    """The same of the blocks of some mixers, by their name in the pattern, where it is another."""
    scale_embeddings: bool = False
    """Whether embeddings are multiplied by sqrt(hidden_size)."""
    embedding_scale: float = setting(1.0, above=0)
    """Factor on embeddings, besides that."""
    residual_scale: float = setting(1.0, above=0)
    """Factor on what mixers and MLPs add to the residual stream."""
    logit_scale: float = setting(1.0, above=0)
    """Factor on logits, before ``logit_softcap``."""
    dropout: float = setting(0.0, minimum=0, below=1)
    """Probability with which training zeroes a channel of an embedding, or of what a mixer or an
    MLP adds to the residual stream."""
    moe: MoEConfig | None = None
    """A mixture of experts in place of MLPs; null: there is none."""
    recursion: RecursionConfig | None = None
    """A loop over some of the blocks; null: every block is passed once."""
