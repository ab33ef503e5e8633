"""Measure what layouts of four CPU processes cost, against formulas.

Bytes sent per step and rank by kind of group, as ring collectives send them; bytes of weights,
gradients and optimizer state held by a rank; the pipeline's idle share against (p - 1) / m; the
peak memory of a process against the planner's prediction.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 benchmarks/parallel_cpu.py
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 benchmarks/parallel_cpu.py --bubble
    python benchmarks/parallel_cpu.py --memory
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import Counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.common.config_loader import build_config
from pretrain.config import ModelConfig, OptimizerConfig, ParallelConfig
from pretrain.data.batches import pack_rows
from pretrain.model.build import build_stages
from pretrain.parallel.processes import data_parallel_rank_and_size, gather, is_main_process
from pretrain.planner.messages import bytes_sent, group_of
from pretrain.training.engine import Engine
from tests.helpers.parallel_worker import start

COUNTS = (4, 8, 16)  # micro-batches of the bubble's steps
VOCAB, HIDDEN, SEQ_LEN, MICRO_BATCHES = 1024, 128, 512, 8  # micro-batches: of the global batch
LAYOUTS = [
    ParallelConfig(zero_stage=0),
    ParallelConfig(),
    ParallelConfig(tensor=2),
    ParallelConfig(tensor=2, sequence=True),
    ParallelConfig(context=2),
    ParallelConfig(context=4),
    ParallelConfig(pipeline=2),
    ParallelConfig(pipeline=2, virtual_pipeline=2),
    ParallelConfig(pipeline=4),
    ParallelConfig(tensor=2, pipeline=2),
    ParallelConfig(tensor=2, pipeline=2, sequence=True),
    *(ParallelConfig(zero_backend="deepspeed", zero_stage=stage) for stage in (1, 2, 3)),
]


def model_config(pattern: str = "gdn attn gdn attn", hidden: int = HIDDEN) -> ModelConfig:
    mixers = {
        "gdn": {"num_heads": 4, "head_dim": hidden // 8},
        "attn": {"num_heads": 4},
    }
    values = {"hidden_size": hidden, "pattern": pattern, "mixers": mixers, "mlp": {"ratio": 2}}
    return build_config(ModelConfig, values, "benchmark")


class SentBytes(TorchDispatchMode):
    """Add up the bytes that the collectives of torch.distributed make this rank send in a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.by_kind: Counter[str] = Counter()
        state = parallel_state
        groups = {
            "tensor": [state.get_tensor_model_parallel_group()],
            "context": [state.get_context_parallel_group()],
            "pipeline": [state.get_pipeline_model_parallel_group()],
            "data": [
                state.get_data_parallel_group(with_context_parallel=cp, partial_data_parallel=part)
                for cp, part in ((False, False), (True, False), (True, True))
            ],
            "embedding": [state.get_embedding_group(check_initialized=False)],
        }
        self._kinds = {g.group_name: kind for kind, found in groups.items() for g in found if g}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        group = group_of(args) if function.namespace == "c10d" else None
        if group is not None:
            kind = self._kinds.get(group.group_name, "other")
            self.by_kind[kind] += round(bytes_sent(function.__name__, args, group))
        return function(*args, **(kwargs or {}))


def data_parallel_passes(parallel: ParallelConfig, micro_batches: int) -> int:
    """Return how often the bytes of a rank's part of the model pass around data-parallel ranks.

    megatron-core: gradients and parameters once each; an all-reduce (ZeRO-0) is as much. DeepSpeed
    all-reduces gradients, at stage 2 those of every micro-batch, and gathers parameters once; at
    stage 3 it gathers parameters before and reduces gradients after every micro-batch.
    """
    if parallel.zero_backend == "megatron":
        return 2
    return {1: 3, 2: 2 * micro_batches + 1, 3: 2 * micro_batches}[parallel.zero_stage]


def expected_bytes(parallel: ParallelConfig, engine: Engine, local: int) -> Counter[str]:
    """Return the bytes that a rank with ``local`` parameters sends per step, in float32."""
    size, data = dist.get_world_size(), data_parallel_rank_and_size()[1]
    tensor, stages = parallel.tensor, parallel.pipeline
    micro_batches = MICRO_BATCHES // data
    expected: Counter[str] = Counter()
    passes = data_parallel_passes(parallel, micro_batches)
    replicas = data * parallel.context
    expected["data"] = round(4 * local * (replicas - 1) / replicas * passes)
    expected["context"] = round(micro_batches * context_bytes(engine, parallel.context))
    activation = 4 * SEQ_LEN * HIDDEN
    # One all-reduce of activations per mixer and MLP forward and one backward, one each for the
    # embedding and the head; or their two halves, where the tokens are sharded, and the inputs
    # again for the weights' gradients.
    ends = sum(part.stage.first + part.stage.last for part in engine.parts)
    blocks = sum(len(part.stage.blocks) for part in engine.parts)
    each = 2 * activation * (tensor - 1) / tensor
    losses = 3 * 2 * 4 * SEQ_LEN * (tensor - 1) / tensor * engine.parts[-1].stage.last
    expected["tensor"] = round(
        micro_batches * (((4 + parallel.sequence) * blocks + ends) * each + losses)
    )
    crossing = 0
    for part in engine.parts:
        crossing += (not part.stage.first) + (not part.stage.last)
    crossing *= activation // (tensor if parallel.sequence else 1)
    expected["pipeline"] = micro_batches * crossing if stages > 1 else 0
    embedding = 4 * VOCAB * HIDDEN / tensor
    if stages > 1 and any(part.stage.first or part.stage.last for part in engine.parts):
        expected["embedding"] = round(embedding)  # an all-reduce of two: each sends it once
    assert size == data * parallel.model_size
    return expected


def context_bytes(engine: Engine, size: int) -> float:
    """Return the bytes that a rank inside a row sends for a micro-batch of one sequence."""
    if size == 1:
        return 0.0
    heads, dim, tokens = 4, HIDDEN // 8, SEQ_LEN / size
    both = 2 if size > 2 else 1  # halos: at the ends of a row they go to one side
    convolved = both * 4 * 3 * heads * 4 * dim  # queries, keys and values twice as wide
    of_delta_rule = (size - 1) * 4 * heads * (2 * dim * 2 * dim + dim**2) + convolved
    of_attention = 4 * tokens * HIDDEN / heads * (size - 1) / size * 4 * (2 * heads)
    half = len(engine.parts[0].stage.blocks) // 2
    return half * (of_delta_rule + of_attention)


def held_bytes() -> int:
    """Return the bytes of all live float tensors: weights, gradients and optimizer state."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if isinstance(found, torch.Tensor) and found.is_floating_point():
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def expected_held(parallel: ParallelConfig, local: int) -> float:
    """Return the bytes that a rank with ``local`` parameters holds.

    In float32 a parameter takes 4 bytes for the weight, 4 for the gradient and 8 for the moments.
    DeepSpeed updates a second copy of the weights and frees gradients, except at stage 3.
    """
    data = data_parallel_rank_and_size()[1] * parallel.context
    if parallel.zero_backend == "deepspeed":
        return local * {1: 4 + 12 / data, 2: 4 + 12 / data, 3: 20 / data}[parallel.zero_stage]
    return local * (4 + 4 + 8 / (1 if parallel.zero_stage == 0 else data))


def batches(micro_batches: int, seq_len: int = SEQ_LEN) -> list[Any]:
    generator = np.random.default_rng(0)
    rows = generator.integers(0, VOCAB, (micro_batches, 1, seq_len + 1))
    return [pack_rows(row, eod_id=0) for row in rows]


def make(config: ModelConfig, parallel: ParallelConfig, seq_len: int) -> tuple[Engine, int]:
    """Return an engine, and the number of this rank's parameters."""
    stages = build_stages(
        config, VOCAB, seed=0, seq_len=seq_len, sequence_parallel=parallel.sequence
    )
    local = sum(p.numel() for stage in stages for p in stage.parameters())
    return Engine(stages, OptimizerConfig(), parallel), local


def costs() -> None:
    tables = []
    for title in ("bytes sent per step (largest of all processes)", "state held (largest)"):
        tables.append(Table(title=title, title_justify="left"))
    for column in ("layout", "kind", "measured MB", "formula MB", "measured / formula"):
        tables[0].add_column(column)
    for column in ("layout", "measured MB", "formula MB", "measured / formula"):
        tables[1].add_column(column)
    for parallel in LAYOUTS:
        start(parallel)
        rank, size = data_parallel_rank_and_size()
        before = held_bytes()
        engine, parameters = make(model_config(), parallel, SEQ_LEN)
        local = batches(MICRO_BATCHES)[rank::size]
        formula = expected_bytes(parallel, engine, parameters)
        engine.train_step(local, 1e-3)
        with SentBytes() as sent:
            engine.train_step(local, 1e-3)
        held = gather((held_bytes() - before, expected_held(parallel, parameters)))
        everyone = gather((sent.by_kind, formula))
        name = layout_name(parallel)
        for kind in ("data", "tensor", "context", "pipeline", "embedding"):
            measured = max(found[kind] for found, _ in everyone)
            wanted = max(found[kind] for _, found in everyone)
            if max(measured, wanted) > 1000:
                tables[0].add_row(name, kind, *_columns(measured, wanted))
        tables[1].add_row(name, *_columns(max(h for h, _ in held), max(e for _, e in held)))
        del engine
    if is_main_process():
        for table in tables:
            Console(width=110).print(table)


def _columns(measured: float, wanted: float) -> tuple[str, str, str]:
    ratio = f"{measured / wanted:.3f}" if wanted else "-"
    return f"{measured / 1e6:.3f}", f"{wanted / 1e6:.3f}", ratio


def layout_name(parallel: ParallelConfig) -> str:
    parts = [f"TP{parallel.tensor}" + "+SP" * parallel.sequence] if parallel.tensor > 1 else []
    if parallel.context > 1:
        parts.append(f"CP{parallel.context}")
    if parallel.pipeline > 1:
        parts.append(f"PP{parallel.pipeline}")
    if parallel.virtual_pipeline > 1:
        parts.append(f"VPP{parallel.virtual_pipeline}")
    if data_parallel_rank_and_size()[1] > 1:
        parts.append(f"DP{data_parallel_rank_and_size()[1]}")
    return f"{' x '.join(parts)}, {parallel.zero_backend} ZeRO-{parallel.zero_stage}"


class _Clock:
    """The simulated clock of a rank.

    A stage takes 1 forward and 2 backward, and continues once its input has arrived and its earlier
    work is done. A number in every activation and gradient that is sent holds the time of sending.
    """

    now = 0.0

    @classmethod
    def work(cls, seconds: float, received: torch.Tensor | None) -> None:
        ready = 0.0 if received is None else float(received.flatten()[0])
        cls.now = max(cls.now, ready) + seconds

    @classmethod
    def stamp(cls, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x.view(-1)[0] = cls.now
        return x


class _Arrives(torch.autograd.Function):
    """A stage's input, whose gradient goes to the previous stage."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return _Clock.stamp(grad)


class _Leaves(torch.autograd.Function):
    """A stage's output, or the losses of the last stage."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, received: torch.Tensor | None, length: float, last: bool
    ) -> torch.Tensor:
        ctx.length, ctx.last = length, last
        _Clock.work(length, received)
        return x.clone() if last else _Clock.stamp(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        _Clock.work(2 * ctx.length, None if ctx.last else grad)
        return grad, None, None, None


def _keep_time(part: Any, length: float) -> None:
    received: list[torch.Tensor | None] = [None]

    def before(*_: Any) -> None:
        received[0] = part._received
        if part._received is not None:
            part._received = _Arrives.apply(part._received)

    part.register_forward_pre_hook(before)
    part.register_forward_hook(
        lambda module, inputs, output: _Leaves.apply(output, received[0], length, part.stage.last)
    )


def bubble() -> None:
    """Print the idle micro-batches of a step, and its time.

    The ranks have simulated clocks that real steps of the real schedules carry along, because two
    busy cores cannot measure idle time.
    """
    table = Table(title="idle time of the pipeline, in micro-batches", title_justify="left")
    for column in ("layout", "m", "measured", "(p - 1) / v", "seconds of the step"):
        table.add_column(column)
    config, seq_len = model_config("8*gdn"), 256
    for stages, parts in ((2, 1), (2, 2), (2, 4), (4, 1), (4, 2)):
        parallel = ParallelConfig(pipeline=stages, virtual_pipeline=parts)
        start(parallel)
        engine, _ = make(config, parallel, seq_len)
        for part in engine.parts:
            _keep_time(part, 1 / parts)
        for count in COUNTS:
            local = batches(count * data_parallel_rank_and_size()[1], seq_len)[:count]
            dist.barrier()
            begin, _Clock.now = time.perf_counter(), 0.0
            engine.backend.forward_backward(local)
            dist.barrier()
            seconds, end = time.perf_counter() - begin, max(gather(_Clock.now))
            table.add_row(
                layout_name(parallel),
                str(count),
                f"{end / 3 - count:.3f}",
                f"{(stages - 1) / parts:.3f}",
                f"{seconds:.2f}",
            )
        del engine
    if is_main_process():
        Console(width=110).print(table)


def memory() -> None:
    """Print measured and planned peak memory of models of width 512 and more."""
    from tests.helpers.memory_worker import CASES, FOUR_CASES, MORE_CASES
    from tests.helpers.planner_figures import measure, plan

    cases = {**CASES, **MORE_CASES, **FOUR_CASES}
    devices = {name: 4 if name in FOUR_CASES else 2 for name in cases}
    planned = plan({n: {"settings": cases[n], "devices": devices[n]} for n in cases})
    measured = measure([name for name in cases if devices[name] == 2])
    measured |= measure(list(FOUR_CASES), 4)
    table = Table(title="most memory of a process for training steps", title_justify="left")
    for column in ("case", "process", "measured MB", "planned MB", "planned / measured"):
        table.add_column(column)
    for name, found in measured.items():
        stages = planned[name]["memory"]
        for rank, got in enumerate(found):
            wanted = stages[rank % len(stages)]
            table.add_row(
                name, str(rank), f"{got / 1e6:.0f}", f"{wanted / 1e6:.0f}", f"{wanted / got:.3f}"
            )
    Console(width=110).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bubble", action="store_true")
    parser.add_argument("--memory", action="store_true")
    chosen = parser.parse_args()
    bubble() if chosen.bubble else memory() if chosen.memory else costs()
