"""Checks across settings: whether those of a section, or of a run, go together.

Those that :func:`check_of` registers are made wherever a section is, in Python or from a file.
How sections go together is checked where a run is to be trained: a saved config may be that of a
converted model, which no data trained. Whether a run fits a number of processes is checked before
any of them has met another, and the vocabulary, which only the data knows, as soon as the data is
open. What depends on the layers is handed in as :class:`ModelLimits`: nothing here knows a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.common.config_loader import ConfigError, check_of, load_config, validate
from pretrain.common.errors import UserError
from pretrain.common.text import control_character
from pretrain.config.branch import settle_branch
from pretrain.config.carried import check_carried
from pretrain.config.conversion import check_conversion
from pretrain.config.distill_checks import check_distill
from pretrain.config.model_checks import check_stages
from pretrain.config.optimizer import OptimizerConfig
from pretrain.config.parallel import ParallelConfig
from pretrain.config.parallel_checks import check_parallel
from pretrain.config.phase_checks import check_batch_warmup, check_phases
from pretrain.config.plan import RunPlan, phase_settings
from pretrain.config.prefix import check_prefix
from pretrain.config.run import RunConfig
from pretrain.config.schedule import SCHEDULES, ScheduleConfig, fraction_of_steps
from pretrain.config.segments import check_segments
from pretrain.config.train import ProfileConfig, TrainConfig


@dataclass(frozen=True)
class ModelLimits:
    """Hold what a model's layers allow of a layout."""

    sharded_counts: dict[str, int]
    """Numbers that tensor parallelism shards, by the setting they come from."""
    most_stages: int
    """Most pipeline stages that the model can be cut into."""
    units: str
    """Reason that there are not more, such as ``the model has 4 blocks``."""


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, extend, override and check a run's settings. Raises ConfigError."""
    config = load_config(RunConfig, path, overrides)
    settle_branch(config, str(path))
    _check_run(config, str(path))
    return config


def check_run_config(config: RunConfig, where: str) -> None:
    """Check every setting once more, whatever was assigned since, and how sections go together.

    Settles where the decay of a branch begins. Raises ConfigError naming ``where`` and the field.
    """
    validate(config, where)
    settle_branch(config, where)
    _check_run(config, where)


def _check_run(config: RunConfig, where: str) -> None:
    train = config.train
    if config.name in ("", ".", "..") or "/" in config.name:
        raise ConfigError(f"{where}: name is '{config.name}', expected a plain name for a folder")
    for key, text in (("name", config.name), ("directory", config.directory or "")):
        if (found := control_character(text)) is not None:
            raise ConfigError(
                f"{where}: {key} is {text!r}, expected text without control characters such as "
                f"{found}"
            )
    _check_profile(config.profile, where)
    if (train.steps is None) == (train.tokens is None):
        raise ConfigError(
            f"{where}: train.steps is {train.steps} and train.tokens {train.tokens}, "
            "expected exactly one of them to be set"
        )
    _check_settings(config, where)
    for number in range(len(config.phases)):
        _check_settings(phase_settings(config, number), f"{where}, phases[{number}]")
    check_phases(config, where)
    check_distill(config, where)
    _check_kept(config, where)
    check_conversion(config, where)
    for name, schedule, steps in RunPlan(config, where).schedules():
        _check_schedule(schedule, steps, where, name)


def _check_profile(profile: ProfileConfig, where: str) -> None:
    steps = profile.steps
    if steps and (len(steps) != 2 or steps[0] > steps[1]):
        raise ConfigError(
            f"{where}: profile.steps is {steps}, expected the first and the last step to trace, "
            "such as [10, 12]"
        )


def _check_settings(config: RunConfig, where: str) -> None:
    """Check how the sections of a run, or of one of its phases, go together."""
    train = config.train
    micro_batch = train.seq_len * config.parallel.micro_batch_size
    if train.global_batch_tokens % micro_batch:
        raise ConfigError(
            f"{where}: train.global_batch_tokens is {train.global_batch_tokens}, expected a "
            f"multiple of seq_len x micro_batch_size = {micro_batch}"
        )
    if train.precision == "fp8" and micro_batch % 16:
        raise ConfigError(
            f"{where}: train.precision is fp8 with seq_len x micro_batch_size = {micro_batch} "
            "tokens, expected a multiple of 16, which float8 products of gradients need"
        )
    check_parallel(config, where)
    _check_experts(config, where)
    check_segments(config, where)
    check_carried(config, where)
    check_prefix(config, where)
    _check_optimizer(config, where)
    check_batch_warmup(config, where)
    if (config.data.path is None) == (not config.data.blend):
        raise ConfigError(f"{where}: expected either data.path or data.blend to be set")
    if config.data.blend and config.data.weights:
        raise ConfigError(
            f"{where}: data.weights is for the sources of data.path; with data.blend, set weights "
            "in its entries"
        )


@check_of(OptimizerConfig)
def _check_betas(optimizer: OptimizerConfig, where: str, section: str) -> None:
    if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
        raise ConfigError(
            f"{where}: {section}betas is {optimizer.betas}, expected two numbers in [0, 1)"
        )


@check_of(TrainConfig)
def _check_budget(train: TrainConfig, where: str, section: str) -> None:
    if train.steps is not None and train.tokens is not None:
        raise ConfigError(
            f"{where}: {section}steps is {train.steps} and {section}tokens {train.tokens}, "
            "expected exactly one of them to be set"
        )
    start, steps = train.batch_warmup_start, train.batch_warmup_steps
    if (start is None) != (steps == 0):
        raise ConfigError(
            f"{where}: {section}batch_warmup_start is {start} and {section}batch_warmup_steps "
            f"{steps}, expected both or neither to be set"
        )
    if start is None:
        return
    doublings, rest = divmod(train.global_batch_tokens, start)
    if rest or doublings & (doublings - 1):
        raise ConfigError(
            f"{where}: {section}batch_warmup_start is {start}, which does not double to "
            f"{section}global_batch_tokens = {train.global_batch_tokens}"
        )


def _check_schedule(schedule: ScheduleConfig, num_steps: int, where: str, name: str) -> None:
    if schedule.decay == "exponential" and schedule.final_ratio == 0:
        raise ConfigError(
            f"{where}: {name}.final_ratio is 0, which an exponential decay never reaches; "
            "expected more than 0"
        )
    flat = num_steps - fraction_of_steps(schedule.decay_fraction, num_steps)
    if SCHEDULES[schedule.kind].decays_at_end and schedule.warmup_steps > flat:
        raise ConfigError(
            f"{where}: {name}.warmup_steps is {schedule.warmup_steps}, but the decay "
            f"begins after {flat:.10g} of the {num_steps} steps; expected at most {int(flat)}, or "
            f"a smaller {name}.decay_fraction"
        )
    if schedule.warmup_steps > num_steps:
        raise ConfigError(
            f"{where}: {name}.warmup_steps is {schedule.warmup_steps}, more than the "
            f"{num_steps} steps of the run; expected at most {num_steps}"
        )


def _check_kept(config: RunConfig, where: str) -> None:
    total = config.plan.tokens
    for tokens in config.checkpoint.keep:
        if tokens > total:
            raise ConfigError(
                f"{where}: checkpoint.keep has {tokens}, which the run never comes to; expected at "
                f"most its {total} tokens"
            )


def _check_optimizer(config: RunConfig, where: str) -> None:
    """Refuse what the backend or the layout cannot do."""
    optimizer, parallel = config.optimizer, config.parallel
    if optimizer.kind != "adamw" and parallel.zero_backend != "megatron":
        raise ConfigError(
            f"{where}: optimizer.kind is {optimizer.kind}, which {parallel.zero_backend} does not "
            "have; expected adamw, or parallel.zero_backend=megatron with zero_stage 0 or 1"
        )
    spikes, checkpoint = config.train.spikes, config.checkpoint
    oldest = checkpoint.keep_last * checkpoint.every
    if spikes.policy == "rollback" and oldest < spikes.rollback_steps + checkpoint.every:
        raise ConfigError(
            f"{where}: train.spikes.rollback_steps is {spikes.rollback_steps}, but of the "
            f"checkpoints every {checkpoint.every} steps the last {checkpoint.keep_last} are kept; "
            f"expected checkpoint.keep_last of at least "
            f"{-(-spikes.rollback_steps // checkpoint.every) + 1}"
        )
    if parallel.zero_backend == "megatron":
        return
    if spikes.policy == "skip":
        raise ConfigError(
            f"{where}: train.spikes.policy is skip, but DeepSpeed has no way to skip a step "
            "whose gradients it has; expected none, rollback, or parallel.zero_backend=megatron"
        )
    for name, value in (
        ("ema_decay", optimizer.ema_decay),
        ("gradient_noise", optimizer.gradient_noise),
    ):
        if value:
            raise ConfigError(
                f"{where}: optimizer.{name} is {value}, which DeepSpeed's optimizers do not have; "
                "expected 0, or parallel.zero_backend=megatron"
            )


def _check_experts(config: RunConfig, where: str) -> None:
    """Check a mixture of experts, and how it is sharded."""
    moe, parallel = config.model.moe, config.parallel
    if moe is None:
        if parallel.expert > 1:
            raise ConfigError(
                f"{where}: parallel.expert is {parallel.expert}, but the model has no experts; "
                "expected 1, or settings under model.moe"
            )
        return
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
            "different tokens; expected parallel.sequence=true"
        )
    if moe.capacity_factor is not None and parallel.tensor > 1:
        raise ConfigError(
            f"{where}: model.moe.capacity_factor is {moe.capacity_factor}, which counts the "
            f"tokens of full sequences; expected null with parallel.tensor {parallel.tensor}"
        )


def check_layout(config: RunConfig, limits: ModelLimits, count: int, where: str) -> None:
    """Check whether a run fits ``count`` processes.

    Raises ConfigError, or UserError for the number of processes, with what would work.
    """
    parallel = config.parallel
    check_tensor_parallel(limits, parallel.tensor, where)
    if config.model.vocab_size is None and 128 % parallel.tensor:
        raise ConfigError(
            f"{where}: model.vocab_size is null, the tokenizer's rounded up to a multiple of 128, "
            f"which parallel.tensor = {parallel.tensor} does not divide; set it to a multiple of "
            f"{parallel.tensor}"
        )
    stages = parallel.pipeline * parallel.virtual_pipeline
    check_stages(limits.most_stages, limits.units, stages, where)
    check_world_size(parallel, count)
    _check_batches(config, count, where)
    for number in range(len(config.phases)):
        _check_batches(phase_settings(config, number), count, f"{where}, phases[{number}]")


def _check_batches(config: RunConfig, count: int, where: str) -> None:
    """Check whether the batches of a run, or of one of its phases, divide over the processes."""
    parallel, train = config.parallel, config.train
    data = count // parallel.model_size
    tokens = train.seq_len * parallel.micro_batch_size * data
    if train.global_batch_tokens % tokens:
        raise ConfigError(
            f"{where}: train.global_batch_tokens is {train.global_batch_tokens}, expected a "
            f"multiple of seq_len x micro_batch_size x data parallel size = {train.seq_len} x "
            f"{parallel.micro_batch_size} x {data} = {tokens}"
        )
    smallest = train.batch_tokens(0)
    if smallest % tokens:
        raise ConfigError(
            f"{where}: train.batch_warmup_start is {smallest}, expected a multiple of seq_len x "
            f"micro_batch_size x data parallel size = {tokens}"
        )
    micro_batches = smallest // tokens
    if parallel.virtual_pipeline > 1 and micro_batches % parallel.pipeline:
        raise ConfigError(
            f"{where}: each process has {micro_batches} micro-batches per step; with "
            f"parallel.virtual_pipeline above 1 a multiple of parallel.pipeline = "
            f"{parallel.pipeline} is expected: change train.global_batch_tokens or "
            "parallel.micro_batch_size"
        )


def check_tensor_parallel(limits: ModelLimits, size: int, where: str) -> None:
    """Raise ConfigError unless ``size`` tensor-parallel processes can share the model."""
    counts = limits.sharded_counts
    for name, count in counts.items():
        if count % size:
            common = math.gcd(*counts.values())
            fitting = [str(n) for n in range(1, common + 1) if common % n == 0]
            raise ConfigError(
                f"{where}: parallel.tensor is {size}, which does not divide {count} ({name}); this "
                f"model fits {', '.join(fitting)}"
            )


def check_world_size(config: ParallelConfig, count: int) -> None:
    """Raise UserError unless ``count`` processes make whole groups of ``model_size``."""
    if count % config.model_size:
        divided = config.context > 1
        context, number = ("context x parallel.", f"{config.context} x ") if divided else ("", "")
        raise UserError(
            f"parallel.tensor x parallel.{context}pipeline is {config.tensor} x {number}"
            f"{config.pipeline} = {config.model_size}, but there are {count} processes; expected a "
            "multiple of it, as "
            f"of torchrun --nproc-per-node {config.model_size}"
        )
    if count // config.pipeline % config.expert:
        raise UserError(
            f"parallel.expert is {config.expert}, which does not divide the "
            f"{count // config.pipeline} processes of a pipeline stage"
        )


def check_vocab_size(rows: int, tokenizer_vocab_size: int, tensor: int, where: str) -> None:
    """Check whether the embedding has a row for every id of the tokenizer, and can be sharded.

    Raises ConfigError naming the field.
    """
    if rows < tokenizer_vocab_size:
        raise ConfigError(
            f"{where}: model.vocab_size is {rows}, fewer than the {tokenizer_vocab_size} ids of "
            "the tokenizer; leave it out to fit"
        )
    if rows % tensor:
        raise ConfigError(
            f"{where}: the vocabulary's {rows} rows do not divide over parallel.tensor "
            f"{tensor}; set model.vocab_size to a multiple of it"
        )


def check_callbacks(skipping: list[str], config: RunConfig, where: str) -> None:
    """Raise ConfigError where the callbacks ``skipping`` skip updates, which DeepSpeed cannot."""
    if skipping and config.parallel.zero_backend == "deepspeed":
        raise ConfigError(
            f"{where}: {skipping[0]} skips updates, which DeepSpeed cannot; expected "
            "parallel.zero_backend=megatron"
        )
