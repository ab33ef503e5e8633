"""The training loop and what surrounds it."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import Literal

from pretrain.common.config_loader import Config, setting


@dataclass
class SpikeConfig(Config):
    """The reaction to a sudden rise of the loss.

    A spike is a loss more than ``deviations`` standard deviations above the mean of the last
    ``window`` steps' losses, and more than ``margin`` above it.
    """

    policy: Literal["none", "skip", "rollback"] = setting("none")
    """``skip`` makes no update of the step (as OLMo-core's SkipStepAdamW); ``rollback`` returns to
    an earlier checkpoint and skips the data that led to the spike (arXiv 2204.02311, section
    5.1)."""
    window: int = setting(128, minimum=8)
    """Steps whose losses a new one is compared with."""
    deviations: float = setting(6.0, above=0)
    """Standard deviations above the mean from which a loss is a spike."""
    margin: float = setting(0.1, minimum=0)
    """Nats above the mean that a spike has at least."""
    rollback_steps: int = setting(100, minimum=1)
    """Steps that ``rollback`` goes back at least, to the next checkpoint before them."""
    skip_steps: int = setting(200, minimum=0)
    """Steps after the spike whose data ``rollback`` skips too."""
    most: int = setting(5, minimum=1)
    """Rollbacks after which the run stops."""


@dataclass
class TrainConfig(Config):
    """The budget, the batch and the numerics; exactly one of ``steps`` and ``tokens`` is set."""

    steps: int | None = setting(None, minimum=1)
    """Optimizer steps of the whole run."""
    tokens: int | None = setting(None, minimum=1)
    """Tokens of the whole run, rounded up to whole steps."""
    seq_len: int = setting(512, minimum=2)
    """Tokens of a sequence."""
    global_batch_tokens: int = setting(8192, minimum=1)
    """Tokens of an optimizer step, over all processes."""
    batch_warmup_steps: int = setting(0, minimum=0)
    """Steps over which the batch doubles, at equal distances, from ``batch_warmup_start`` to
    ``global_batch_tokens`` (arXiv 2505.23971); 0: off."""
    batch_warmup_start: int | None = setting(None, minimum=1)
    """Tokens of the first step, with ``batch_warmup_steps`` alone."""
    precision: Literal["float32", "bf16", "fp8"] = setting("float32")
    """Type of activations and of the weights in use; the optimizer keeps float32. ``fp8`` is
    ``bf16`` with the products of projections in float8, by torchao."""
    activation_checkpointing: Literal["none", "selective", "block"] = setting("none")
    """What the backward pass computes again, to the same bits: ``selective`` norms, activations,
    gates, rotary positions and short convolutions, but no matrix product, attention, recurrence or
    exchange; ``block`` all of a block but its input."""
    segment_tokens: int | None = setting(None, minimum=1)
    """Tokens of a segment of a row of ``seq_len`` x ``parallel.micro_batch_size``; null: rows are
    computed as a whole. By segments the memory of activations is one segment's, with the gradients
    of the whole row; every product is computed twice forward, as with ``block``."""
    carry_state: bool = False
    """Whether layers go on, at the beginning of a row, from the state at the end of the same row of
    the step before, without gradients through it (truncated back-propagation through time). Rows
    then read on from step to step; a new document begins without a state as ever."""
    carry_steps: int = setting(64, minimum=1)
    """With ``carry_state``, the steps for which a row reads on before it goes to another place;
    where phases have several lengths, those of sequences as long as ``data.window``."""
    carry_state_noise: float = setting(0.0, minimum=0)
    """Standard deviation of normal noise on carried states, as a multiple of the root mean square
    of a layer's state of one row; not on keys and values of a window, normalisers, and
    stabilisers (arXiv 2507.02782)."""
    nonfinite: Literal["stop", "skip"] = setting("stop")
    """What a loss or gradient that is not finite does to the run: end it, or skip the step."""
    find_origin: bool = True
    """Whether a step that is not finite is run again, to name the block, operation, process and
    document that made it, and to write a file with which ``python -m pretrain replay`` repeats
    it."""
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    """What a sudden rise of the loss does."""
    freeze: list[str] = field(default_factory=list)
    """Parameters that do not learn and have no optimizer state, by patterns of their names, or of
    the names of modules that hold them: ``embedding``, ``blocks.*.mlp``, ``blocks.0``."""
    threads: int | None = setting(None, minimum=1, maximum=1024)
    """Threads of torch in each process; null: torch's own choice."""

    @property
    def num_steps(self) -> int:
        """Return the number of optimizer steps of the whole run."""
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
        """Return the number of tokens of optimizer step ``step``, counted from 0."""
        if self.batch_warmup_start is None or step >= self.batch_warmup_steps:
            return self.global_batch_tokens
        doublings = (self.global_batch_tokens // self.batch_warmup_start).bit_length() - 1
        return self.batch_warmup_start << (step * doublings // self.batch_warmup_steps)

    def step_at(self, tokens: int) -> int:
        """Return the number of steps after which ``tokens`` tokens are done for the first time."""
        return bisect.bisect_left(range(tokens + 1), tokens, key=self.tokens_before)

    def tokens_before(self, step: int) -> int:
        """Return the number of tokens of all steps before ``step``."""
        warm = min(step, self._warmup_steps)
        rest = (step - warm) * self.global_batch_tokens
        return rest + sum(self.batch_tokens(i) for i in range(warm))


@dataclass
class ValidationConfig(Config):
    """The loss on held-out text."""

    every: int = setting(100, minimum=0)
    """Steps between validations; 0: only at the end."""
    tokens: int = setting(65_536, minimum=1)
    """Tokens of a validation, always the same ones: windows at equal distances in the validation
    text, of every source in its share."""


@dataclass
class CheckpointConfig(Config):
    """Checkpoints of a run, in the folder ``checkpoints`` of its directory."""

    every: int = setting(200, minimum=1)
    """Steps between saves; the last step is always saved."""
    keep_last: int = setting(2, minimum=1)
    """Checkpoints that are kept, the newest; older ones are removed unless they are milestones."""
    milestone_every: int = setting(0, minimum=0)
    """Checkpoints at multiples of so many steps are kept for good; 0: none are."""
    keep: list[int] = setting(factory=list, minimum=1)
    """Tokens, rounded up to whole steps, at which a checkpoint is saved and kept for good: those
    that branches are to begin from."""
    retries: int = setting(3, minimum=0)
    """Saves in a row that may fail, on a full disk or a folder that cannot be reached, before the
    run ends. Each is reported, and what it should have kept is saved again when the next save is
    due; the last save of a run is tried again after some seconds. Meanwhile lines of the log and of
    the metrics that cannot be written are kept in memory."""
    background: bool = True
    """Whether they are written from a copy in host memory while training continues. That memory, as
    large as what a process writes, is kept for the next save until the run ends."""
    verify: Literal["sha256", "size"] = setting("sha256")
    """What is checked of every file before loading: its hash, or only its size."""
    resume: str | None = None
    """Name of the checkpoint of this run to resume from; null: the latest."""


@dataclass
class LoggingConfig(Config):
    """The log and the metrics of a run."""

    every: int = setting(10, minimum=1)
    """Steps between lines of the log and of the metrics, which have a step's loss and the mean
    since the line before."""
    blocks: int = setting(0, minimum=0)
    """Steps between statistics of every block in ``blocks.jsonl``: sizes of activations, gradients,
    weights and updates, gates and states; 0: none. Such a step holds the weights twice."""
    wandb: Literal["disabled", "offline", "online"] = setting("disabled")
    """Whether metrics are mirrored to Weights & Biases."""
    wandb_project: str = "pretrain"
    """The project there."""
    tensorboard: bool = False
    """Whether metrics are also written as TensorBoard's event files in the run directory."""
    command_and_diff: bool = True
    """Whether ``environment.json`` keeps the command and the uncommitted changes, with ``****`` for
    what looks like a key or password in them (and W&B the command, as it is)."""


@dataclass
class ProfileConfig(Config):
    """A trace of some steps by torch.profiler, in the folder ``profiles`` of the run directory."""

    steps: list[int] = setting(factory=list, minimum=1)
    """The first and the last step to trace, as ``[10, 12]``; empty: none."""
    memory: bool = True
    """Whether a picture of the memory of these steps is drawn too."""


@dataclass
class EvalConfig(Config):
    """Tasks of ``python -m evals`` while training."""

    tasks: list[str] = field(default_factory=list)
    """Names of the tasks."""
    every: int = setting(0, minimum=0)
    """Steps between evaluations; 0: only at the end."""
    limit: int | None = setting(None, minimum=1)
    """Documents of each task; null: all of them."""
    num_fewshot: int | None = setting(None, minimum=0)
    """Examples in a prompt; null: the task's own number."""
    max_length: int | None = setting(None, minimum=2)
    """Tokens of a request, which is cut to them; null: ``train.seq_len``."""
    bos: Literal["document", "none"] = setting("document")
    """What opens a request: the token that opens a document, or nothing."""
    tokens_per_pass: int = setting(8192, minimum=1)
    """Tokens of one forward pass."""


@dataclass
class SampleConfig(Config):
    """Text generated when the run ends."""

    prompt: str = ""
    """What the text begins with."""
    tokens: int = setting(128, minimum=0)
    """Tokens to generate; 0: no text."""
    temperature: float = setting(0.8, minimum=0)
    """Temperature of sampling; 0: always the likeliest token."""
