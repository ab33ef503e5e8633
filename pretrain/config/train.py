"""The training loop and what surrounds it."""

from __future__ import annotations

from dataclasses import dataclass, field

from pretrain.common.config_loader import setting


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
