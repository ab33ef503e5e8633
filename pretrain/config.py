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
    depth_scaled_init: output projections start smaller by sqrt(2 x blocks passed); block_norm:
    ``pre``, or ``sandwich``, which also normalises the stream behind mixer and MLP;
    scale_embeddings: multiply embeddings by sqrt(hidden_size); moe: see MoEConfig; recursion: see
    RecursionConfig."""

    pattern: str
    hidden_size: int = setting(minimum=1)
    mixers: dict[str, Any] = field(default_factory=dict)
    mlp: MLPConfig = field(default_factory=MLPConfig)
    vocab_size: int | None = setting(None, minimum=1)
    tie_embeddings: bool = True
    norm_eps: float = setting(1e-6, above=0)
    init_std: float = setting(0.02, above=0)
    depth_scaled_init: bool = True
    block_norm: str = setting("pre", choices=("pre", "sandwich"))
    scale_embeddings: bool = False
    moe: MoEConfig | None = None
    recursion: RecursionConfig | None = None


@dataclass
class OptimizerConfig:
    """AdamW; weight decay acts on matrices only. clip_grad: global norm, 0 = off."""

    lr: float = setting(1e-3, above=0)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = setting(1e-8, above=0)
    weight_decay: float = setting(0.1, minimum=0)
    clip_grad: float = setting(1.0, minimum=0)


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
class TrainConfig:
    """steps or tokens: the budget, exactly one of them; global_batch_tokens: tokens per optimizer
    step over all processes.

    nonfinite: what a loss or gradient that is not finite does, ``stop`` or ``skip`` the step.
    activation_checkpointing: ``block`` keeps only each block's input and recomputes the rest.
    """

    steps: int | None = setting(None, minimum=1)
    tokens: int | None = setting(None, minimum=1)
    seq_len: int = setting(512, minimum=2)
    global_batch_tokens: int = setting(8192, minimum=1)
    precision: str = setting("float32", choices=("float32", "bf16"))
    activation_checkpointing: str = setting("none", choices=("none", "block"))
    nonfinite: str = setting("stop", choices=("stop", "skip"))
    threads: int | None = setting(None, minimum=1, maximum=1024)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.steps is not None:
            return self.steps
        return -(-(self.tokens or 0) // self.global_batch_tokens)

    @property
    def sequences_per_step(self) -> int:
        return self.global_batch_tokens // self.seq_len


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
    the ``device`` or in ``cpu`` memory.

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
    offload: str = setting("device", choices=("device", "cpu"))
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
    config = load_config(RunConfig, path, overrides)
    check_run_config(config, str(path))
    return config


def check_run_config(config: RunConfig, where: str) -> None:
    """What one field alone cannot tell. Raises ConfigError naming the field."""
    train, optimizer = config.train, config.optimizer
    if config.name in ("", ".", "..") or "/" in config.name:
        raise ConfigError(f"{where}: name is '{config.name}', expected a plain name for a folder")
    if (train.steps is None) == (train.tokens is None):
        raise ConfigError(
            f"{where}: train.steps is {train.steps} and train.tokens {train.tokens}, "
            "expected exactly one of them to be set"
        )
    micro_batch = train.seq_len * config.parallel.micro_batch_size
    if train.global_batch_tokens % micro_batch:
        raise ConfigError(
            f"{where}: train.global_batch_tokens is {train.global_batch_tokens}, expected a "
            f"multiple of seq_len x micro_batch_size = {micro_batch}"
        )
    _check_parallel(config, where)
    _check_experts(config, where)
    if (config.data.path is None) == (not config.data.blend):
        raise ConfigError(f"{where}: expected either data.path or data.blend to be set")
    if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
        raise ConfigError(
            f"{where}: optimizer.betas is {optimizer.betas}, expected two numbers in [0, 1)"
        )
    if config.schedule.decay == "exponential" and config.schedule.final_ratio == 0:
        raise ConfigError(
            f"{where}: schedule.final_ratio is 0, which an exponential decay never reaches; "
            "expected more than 0"
        )
    flat = train.num_steps * (1 - config.schedule.decay_fraction)
    if config.schedule.kind in ("wsd", "two_stage") and config.schedule.warmup_steps > flat:
        raise ConfigError(
            f"{where}: schedule.warmup_steps is {config.schedule.warmup_steps}, but the decay "
            f"begins after {flat:g} of the {train.num_steps} steps"
        )
    if config.schedule.warmup_steps > train.num_steps:
        raise ConfigError(
            f"{where}: schedule.warmup_steps is {config.schedule.warmup_steps}, more than the "
            f"{train.num_steps} steps of the run"
        )


def _check_experts(config: RunConfig, where: str) -> None:
    """A mixture of experts, and how it is divided."""
    moe, parallel = config.model.moe, config.parallel
    if moe is None:
        if parallel.expert > 1:
            raise ConfigError(
                f"{where}: parallel.expert is {parallel.expert}, but the model has no experts; "
                "expected 1, or settings under model.moe"
            )
        return
    if moe.top_k > moe.num_experts:
        raise ConfigError(
            f"{where}: model.moe.top_k is {moe.top_k}, expected at most its num_experts = "
            f"{moe.num_experts}"
        )
    if config.model.mlp.kind == "none":
        raise ConfigError(
            f"{where}: model.moe takes the place of MLPs, but model.mlp.kind is none; expected "
            "swiglu or gelu"
        )
    if moe.num_experts % parallel.expert:
        raise ConfigError(
            f"{where}: parallel.expert is {parallel.expert}, which does not divide the "
            f"{moe.num_experts} experts"
        )
    if parallel.zero_backend != "megatron":
        raise ConfigError(
            f"{where}: parallel.zero_backend is {parallel.zero_backend}, which does not know "
            "experts; expected megatron"
        )
    if parallel.tensor > 1 and not parallel.sequence:
        raise ConfigError(
            f"{where}: with model.moe and parallel.tensor {parallel.tensor} every process routes "
            "tokens of its own; expected parallel.sequence=true"
        )
    if moe.capacity_factor is not None and parallel.tensor > 1:
        raise ConfigError(
            f"{where}: model.moe.capacity_factor is {moe.capacity_factor}, which counts a whole "
            f"micro-batch's tokens; expected null with parallel.tensor {parallel.tensor}"
        )


def _check_parallel(config: RunConfig, where: str) -> None:
    """The settings of ``parallel`` among themselves."""
    parallel = config.parallel
    row = config.train.seq_len
    if parallel.sequence and (parallel.tensor == 1 or row % parallel.tensor):
        raise ConfigError(
            f"{where}: parallel.sequence divides the train.seq_len = {row} tokens of a sequence "
            f"over parallel.tensor processes, found {parallel.tensor}; expected a divisor above 1"
        )
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise ConfigError(
            f"{where}: parallel.virtual_pipeline is {parallel.virtual_pipeline}, which needs "
            "parallel.pipeline above 1"
        )
    stage, backend = parallel.zero_stage, parallel.zero_backend
    if stage > 1 and parallel.pipeline > 1:
        raise ConfigError(
            f"{where}: parallel.zero_stage is {stage} with parallel.pipeline {parallel.pipeline}: "
            "gradients that are divided as soon as they are made cannot add up over a pipeline's "
            "micro-batches; expected zero_stage 0 or 1, or pipeline 1"
        )
    if stage > 1 and backend != "deepspeed":
        raise ConfigError(
            f"{where}: parallel.zero_stage is {stage}, which the {backend} backend does not have; "
            "expected 0 or 1, or parallel.zero_backend=deepspeed"
        )
    if parallel.offload != "device" and (backend != "deepspeed" or stage == 0):
        raise ConfigError(
            f"{where}: parallel.offload is {parallel.offload}, expected device, or "
            "parallel.zero_backend=deepspeed with parallel.zero_stage 1 to 3"
        )


__all__ = ["ConfigError", "RunConfig", "check_run_config", "load_run_config", "to_yaml"]
