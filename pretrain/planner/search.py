"""The layouts that a number of devices could train a model with, fastest first."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from pretrain.common.errors import UserError
from pretrain.config import ParallelConfig, RunConfig, check_run_config
from pretrain.config.checks import check_vocab_size
from pretrain.model.layout import check_layout
from pretrain.planner.estimate import Planner
from pretrain.planner.figures import Estimate

CHECKPOINTING = ("none", "selective", "block")
SHORTEST_SEGMENT = 8192  # tokens; of shorter ones rows for each process are faster


@dataclass
class Candidate:
    """A layout that may be possible.

    Attributes:
        estimate: None where the layout is not possible at all.
        why: Why it is not, or does not fit; empty where it fits.
    """

    parallel: ParallelConfig
    checkpointing: str
    estimate: Estimate | None
    why: str = ""

    def describe(self, devices: int) -> str:
        """Return the layout in a few letters."""
        parallel = self.parallel
        data = devices // parallel.model_size
        parts = [
            f"TP{parallel.tensor}" * (parallel.tensor > 1),
            f"CP{parallel.context}" * (parallel.context > 1),
            f"EP{parallel.expert}" * (parallel.expert > 1),
            f"PP{parallel.pipeline}" * (parallel.pipeline > 1),
            f"VPP{parallel.virtual_pipeline}" * (parallel.virtual_pipeline > 1),
            f"DP{data}" * (data > 1),
            f"ZeRO-{parallel.zero_stage}" * (data * parallel.context > 1),
        ]
        return " ".join(p for p in parts if p) or "one device"

    def settings(self) -> str:
        """Return the candidate as overrides of the command line."""
        parallel = self.parallel if self.estimate is None else self.estimate.parallel
        chosen = {
            "tensor": parallel.tensor,
            "sequence": str(parallel.sequence).lower(),
            "context": parallel.context,
            "context_cells": parallel.context_cells,
            "context_scans": parallel.context_scans,
            "expert": parallel.expert,
            "pipeline": parallel.pipeline,
            "virtual_pipeline": parallel.virtual_pipeline,
            "micro_batch_size": parallel.micro_batch_size,
            "zero_stage": parallel.zero_stage,
            "zero_backend": parallel.zero_backend,
        }
        words = [f"parallel.{name}={value}" for name, value in chosen.items()]
        return " ".join([*words, f"train.activation_checkpointing={self.checkpointing}"])


def candidates(
    devices: int, per_node: int, experts: int = 1, seq_len: int = 0
) -> Iterator[ParallelConfig]:
    """Yield layouts: tensor parallelism within a node, pipelines, and ZeRO over the rest.

    ``experts``, where there are any, are sharded over as many devices as possible. Sequences of
    ``seq_len`` tokens, where they are long, are also cut into segments.
    """
    for layout in _dense(devices, per_node, seq_len):
        yield layout
        if layout.zero_backend == "megatron":
            for expert in _powers(min(experts, devices // layout.pipeline))[1:]:
                yield dataclasses.replace(layout, expert=expert)


def _dense(devices: int, per_node: int, seq_len: int) -> Iterator[ParallelConfig]:
    for tensor in _powers(min(devices, per_node)):
        for pipeline in _powers(min(devices // tensor, 16)):
            for parts in (1, 2, 4) if pipeline > 1 else (1,):
                for rows in (1, 2, 4, 8):
                    layout = ParallelConfig(
                        tensor=tensor,
                        sequence=tensor > 1,
                        pipeline=pipeline,
                        virtual_pipeline=parts,
                        micro_batch_size=rows,
                    )
                    yield layout
                    if rows == parts == 1:  # several rows gain nothing from segments
                        most = min(devices // (tensor * pipeline), seq_len // SHORTEST_SEGMENT)
                        for context in _powers(most)[1:]:
                            yield dataclasses.replace(layout, context=context)
                    if pipeline == 1 and devices > tensor:
                        yield dataclasses.replace(layout, zero_stage=3, zero_backend="deepspeed")


def search(planner: Planner, devices: int) -> list[Candidate]:
    """Return every candidate: those that fit first, fastest first, then the others."""
    found = []
    moe = planner.config.model.moe
    experts = moe.num_experts if moe is not None else 1
    per_node, seq_len = planner.hardware.devices_per_node, planner.config.train.seq_len
    for parallel in candidates(devices, per_node, experts, seq_len):
        for checkpointing in CHECKPOINTING:
            found.append(_try(planner, parallel, devices, checkpointing))
    fits = [c for c in found if not c.why]
    fits.sort(key=lambda c: c.estimate.step_seconds if c.estimate else 0.0)
    return fits + [c for c in found if c.why]


def nothing_fits(config: RunConfig, found: list[Candidate], devices: int) -> str:
    """Return why none of the candidates that were found fits, and what would."""
    too_large = [c for c in found if c.estimate is not None]
    if too_large:
        nearest = min(too_large, key=lambda c: c.estimate.peak_memory if c.estimate else 0.0)
        return (
            f"no layout of {devices:,} devices fits, the nearest {nearest.why}; take more devices, "
            "larger ones or a smaller model"
        )
    rows = config.train.global_batch_tokens // config.train.seq_len
    fitting = max(n for n in range(1, min(rows, devices) + 1) if rows % n == 0)
    return (
        f"no layout of {devices:,} devices is possible; with the {rows:,} sequences of "
        f"train.global_batch_tokens, {fitting:,} would be, or products of their divisors with "
        "parallel.tensor and parallel.pipeline"
    )


def _try(planner: Planner, parallel: ParallelConfig, devices: int, checkpointing: str) -> Candidate:
    config: RunConfig = copy.copy(planner.config)
    config.parallel = parallel
    config.train = dataclasses.replace(
        config.train,
        activation_checkpointing=checkpointing,  # type: ignore[arg-type]
    )
    try:
        check_run_config(config, "")
        check_layout(config, devices, "")
        check_vocab_size(planner.vocab_size, planner.vocab_size, parallel.tensor, "")
        planner.check_learning(parallel)
    except UserError as error:  # or its subclass ConfigError
        return Candidate(parallel, checkpointing, None, str(error).removeprefix(": "))
    estimate = planner.estimate(parallel, devices, checkpointing)
    limit = planner.hardware.memory_bytes
    why = ""
    if estimate.peak_memory > limit:
        why = f"needs {estimate.peak_memory / 1e9:,.1f} GB, but {limit / 1e9:,.1f} GB are there"
    return Candidate(parallel, checkpointing, estimate, why)


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]
