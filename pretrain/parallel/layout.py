"""Whether a run fits a number of processes, before any of them has met another."""

from __future__ import annotations

from pretrain.common.config_loader import ConfigError
from pretrain.config import ParallelConfig, RunConfig
from pretrain.model.spec import check_tensor_parallel
from pretrain.model.stages import split_into_stages
from pretrain.parallel.processes import check_world_size


def check_layout(config: RunConfig, count: int, where: str) -> None:
    """Raise ConfigError, or UserError for the number of processes, with what would work."""
    parallel, train = config.parallel, config.train
    check_tensor_parallel(config.model, parallel.tensor, where)
    if config.model.vocab_size is None and 128 % parallel.tensor:
        raise ConfigError(
            f"{where}: model.vocab_size is null, the tokenizer's rounded up to a multiple of 128, "
            f"which parallel.tensor = {parallel.tensor} does not divide; set it to a multiple of "
            f"{parallel.tensor}"
        )
    stages = parallel.pipeline * parallel.virtual_pipeline
    # How large the vocabulary is moves the stages' borders, not their possible number.
    split_into_stages(config.model, config.model.vocab_size or 1, train.seq_len, stages, where)
    check_world_size(parallel, count)
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


def describe_layout(parallel: ParallelConfig, count: int, what: str = "process") -> str:
    """How the processes, or whatever they are called, work together, in words."""
    parts = {
        "tensor-parallel": parallel.tensor,
        "pipeline stages": parallel.pipeline,
        "data-parallel": count // parallel.model_size,
    }
    shared = [f"{number} {name}" for name, number in parts.items() if number > 1]
    experts = f", experts divided by {parallel.expert}" if parallel.expert > 1 else ""
    plural = "" if count == 1 else "es" if what.endswith("s") else "s"
    processes = f"{count} {what}{plural}"
    return f"{processes} ({' x '.join(shared)}{experts})" if shared else processes
