"""Every setting of a training run. Dataclasses are the only schema; see :func:`load_run_config`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.config_files import ConfigError, load_config, setting, to_yaml

SCHEDULES = ("constant", "linear", "cosine", "wsd", "two_stage")
DECAYS = ("linear", "sqrt", "exponential")
ZERO_BACKENDS = ("megatron", "deepspeed")


@dataclass
class DataSource:
    """One prepared directory of a blend; weight is its share of the samples."""

    path: str
    weight: float = setting(1.0, above=0)


@dataclass
class DataConfig:
    """path: a directory that data_prep made, whose sources are blended by the weights in its
    manifest; or blend: several such directories with weights of their own."""

    path: str | None = None
    blend: list[DataSource] = field(default_factory=list)


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
class InitializeConfig:
    """Start from another run's weights. checkpoint: a run directory or one of its checkpoints;
    method: which of its blocks become the loop of a recursive model: ``stepwise`` (equally spaced,
    first and last among them), ``average`` or ``lower`` (the first ones); lora: ``svd`` starts the
    low-rank differences from what the loop lost, ``zero`` from nothing."""

    checkpoint: str
    method: str = setting("stepwise", choices=("stepwise", "average", "lower"))
    lora: str = setting("svd", choices=("svd", "zero"))


@dataclass
class ModelConfig:
    """pattern: the blocks, see pretrain/models/pattern.py; mixers: settings by name, only what
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


@dataclass
class OptimizerConfig:
    """AdamW; weight decay acts on matrices only. clip_grad: global norm, 0 = off.

    kind: ``muon`` updates the matrices of the blocks by their orthogonalised momentum
    (``muon_momentum``, Nesterov's), scaled to the size of AdamW's updates so that one learning rate
    and weight decay serve both (arXiv 2502.16982); all else stays with AdamW. ema_decay: of an
    exponential average of the weights over steps, saved with every checkpoint for
    ``python -m evals --weights ema``; 0 = none (Polyak and Juditsky 1992; arXiv 2306.03241).
    gradient_noise: eta of Gaussian noise of variance eta / (1 + step)^0.55 that is added to clipped
    gradients (arXiv 1511.06807).
    """

    kind: str = setting("adamw", choices=("adamw", "muon"))
    lr: float = setting(1e-3, above=0)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = setting(1e-8, above=0)
    weight_decay: float = setting(0.1, minimum=0)
    clip_grad: float = setting(1.0, minimum=0)
    muon_momentum: float = setting(0.95, minimum=0, below=1)
    ema_decay: float = setting(0.0, minimum=0, below=1)
    gradient_noise: float = setting(0.0, minimum=0)


@dataclass
class ScheduleConfig:
    """Learning rate over steps; see pretrain/schedule.py.

    warmup_steps: linear from 0; decay_fraction: share of all steps in which ``wsd`` decays, or
    after which share ``two_stage`` drops; decay: shape of the wsd decay; final_ratio: learning rate
    as a share of the peak where the decay ends, one step behind the last.
    """

    kind: str = setting("cosine", choices=SCHEDULES)
    warmup_steps: int = setting(100, minimum=0)
    decay: str = setting("linear", choices=DECAYS)
    decay_fraction: float = setting(0.2, above=0, maximum=1)
    final_ratio: float = setting(0.1, minimum=0, maximum=1)


@dataclass
class SpikeConfig:
    """What a sudden rise of the loss does: ``none``; ``skip`` leaves the step out (as
    OLMo-core's SkipStepAdamW); ``rollback`` goes back to a checkpoint at
    least ``rollback_steps`` older and from there leaves out the data up to the spike and of
    ``skip_steps`` further steps (arXiv 2204.02311, section 5.1).

    A spike is a loss more than ``deviations`` standard deviations above the mean of the last
    ``window`` steps' losses, and more than ``margin`` nats. After ``most`` rollbacks the run stops.
    """

    policy: str = setting("none", choices=("none", "skip", "rollback"))
    window: int = setting(128, minimum=8)
    deviations: float = setting(6.0, above=0)
    margin: float = setting(0.1, minimum=0)
    rollback_steps: int = setting(100, minimum=1)
    skip_steps: int = setting(200, minimum=0)
    most: int = setting(5, minimum=1)


@dataclass
class TrainConfig:
    """steps or tokens: the budget, exactly one of them; global_batch_tokens: tokens per optimizer
    step over all processes.

    batch_warmup_steps: over so many steps the batch doubles, at equal distances, from
    ``batch_warmup_start`` tokens to global_batch_tokens (arXiv 2505.23971); 0 = off.

    nonfinite: what a loss or gradient that is not finite does, ``stop`` or ``skip`` the step.
    activation_checkpointing: ``block`` keeps only each block's input and recomputes the rest.
    """

    steps: int | None = setting(None, minimum=1)
    tokens: int | None = setting(None, minimum=1)
    seq_len: int = setting(512, minimum=2)
    global_batch_tokens: int = setting(8192, minimum=1)
    batch_warmup_steps: int = setting(0, minimum=0)
    batch_warmup_start: int | None = setting(None, minimum=1)
    precision: str = setting("float32", choices=("float32", "bf16"))
    activation_checkpointing: str = setting("none", choices=("none", "block"))
    nonfinite: str = setting("stop", choices=("stop", "skip"))
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    threads: int | None = setting(None, minimum=1, maximum=1024)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.steps is not None:
            return self.steps
        steps = self._warmup_steps
        rest = (self.tokens or 0) - self.tokens_before(steps)
        if rest >= 0:
            return steps - (-rest // self.global_batch_tokens)
        while self.tokens_before(steps - 1) >= (self.tokens or 0):
            steps -= 1
        return steps

    @property
    def _warmup_steps(self) -> int:
        return self.batch_warmup_steps if self.batch_warmup_start is not None else 0

    def batch_tokens(self, step: int) -> int:
        """Tokens of optimizer step ``step``, counted from 0."""
        if self.batch_warmup_start is None or step >= self.batch_warmup_steps:
            return self.global_batch_tokens
        doublings = (self.global_batch_tokens // self.batch_warmup_start).bit_length() - 1
        return self.batch_warmup_start << (step * doublings // self.batch_warmup_steps)

    def tokens_before(self, step: int) -> int:
        """Tokens of all steps before ``step``."""
        warm = min(step, self._warmup_steps)
        rest = (step - warm) * self.global_batch_tokens
        return rest + sum(self.batch_tokens(i) for i in range(warm))


@dataclass
class ParallelConfig:
    """How processes share the work. What remains of them after tensor x pipeline is data-parallel.

    tensor: processes that share every layer by its heads and channels; sequence: they also share
    the tokens outside the layers. pipeline: stages that the blocks are divided into, evenly by
    their FLOPs; virtual_pipeline: parts of every stage, gone through by turns (less idle time, more
    messages). expert: processes, of those that share the data, that divide a mixture's experts
    among them. micro_batch_size: sequences per forward pass.

    zero_stage: what data-parallel processes divide among them: 0 nothing, 1 the optimizer's state,
    2 gradients too, 3 parameters too; zero_backend: ``megatron`` (0 and 1) or ``deepspeed`` (0 and
    1, without a pipeline also 2 and 3); offload: where DeepSpeed keeps the optimizer's state, on
    the ``device``, in ``cpu`` memory or, of zero_stage 3, in files on a local ``nvme`` disk, in the
    folder offload_path.

    overlap: exchange gradients while the backward pass goes on, and parameters while the next
    forward pass does. timeout_minutes: how long processes wait for one that does not answer.
    """

    tensor: int = setting(1, minimum=1)
    sequence: bool = False
    pipeline: int = setting(1, minimum=1)
    virtual_pipeline: int = setting(1, minimum=1)
    expert: int = setting(1, minimum=1)
    micro_batch_size: int = setting(8, minimum=1)
    zero_stage: int = setting(1, minimum=0, maximum=3)
    zero_backend: str = setting("megatron", choices=ZERO_BACKENDS)
    offload: str = setting("device", choices=("device", "cpu", "nvme"))
    offload_path: str | None = None
    overlap: bool = True
    timeout_minutes: float = setting(30, above=0)

    @property
    def model_size(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor * self.pipeline

    @property
    def one_has_all(self) -> bool:
        """Whether a process can use the model without the others, as for a sample."""
        return self.model_size == self.expert == 1 and self.zero_stage < 3


@dataclass
class ValidationConfig:
    """every: steps between validations, 0 = only at the end; tokens: how many, spread evenly
    over the validation shards, always the same ones."""

    every: int = setting(100, minimum=0)
    tokens: int = setting(65_536, minimum=1)


@dataclass
class CheckpointConfig:
    """every: steps between saves (the last step is always saved); keep_last: older ones are
    removed, except multiples of milestone_every (0 = no milestones); background: write from a copy
    in the processor's memory while training goes on; verify: check the sha256 of
    every file before loading, or only the sizes; resume: the name of a checkpoint of this run to go
    on from instead of the latest."""

    every: int = setting(200, minimum=1)
    keep_last: int = setting(2, minimum=1)
    milestone_every: int = setting(0, minimum=0)
    background: bool = True
    verify: str = setting("sha256", choices=("sha256", "size"))
    resume: str | None = None


@dataclass
class LoggingConfig:
    """every: steps between lines; wandb: mirror metrics to Weights & Biases."""

    every: int = setting(10, minimum=1)
    wandb: str = setting("disabled", choices=("disabled", "offline", "online"))
    wandb_project: str = "pretrain"


@dataclass
class EvalConfig:
    """Tasks of ``python -m evals`` while training. tasks: their names; every: steps between
    evaluations, 0 = only at the end; limit: documents of each task, null = all; num_fewshot:
    examples in a prompt, null = the task's own; max_length: tokens of a request, null = seq_len;
    bos: what opens a request, the token that opens a ``document`` or ``none``; tokens_per_pass: of
    one forward pass."""

    tasks: list[str] = field(default_factory=list)
    every: int = setting(0, minimum=0)
    limit: int | None = setting(None, minimum=1)
    num_fewshot: int | None = setting(None, minimum=0)
    max_length: int | None = setting(None, minimum=2)
    bos: str = setting("document", choices=("document", "none"))
    tokens_per_pass: int = setting(8192, minimum=1)


@dataclass
class SampleConfig:
    """Text generated when the run ends; tokens = 0 for none."""

    prompt: str = ""
    tokens: int = setting(128, minimum=0)
    temperature: float = setting(0.8, minimum=0)


@dataclass
class RunConfig:
    """A training run. directory: null = runs/NAME; initialize: null = random weights."""

    name: str
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    initialize: InitializeConfig | None = None
    directory: str | None = None
    seed: int = setting(0, minimum=0)

    @property
    def run_directory(self) -> Path:
        return Path(self.directory or Path("runs") / self.name)


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, extend, override and check a run's settings. Raises ConfigError."""
    from pretrain.config_checks import check_run_config

    config = load_config(RunConfig, path, overrides)
    check_run_config(config, str(path))
    return config


__all__ = ["ConfigError", "RunConfig", "load_run_config", "to_yaml"]
