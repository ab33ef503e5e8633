"""Measure what dividing a row over processes costs: work, bytes, waiting, and memory by length.

``python -m benchmarks.context_cpu [work] [products] [bytes] [stagger] [memory] [planned]`` measures
on this machine's CPU, over gloo; all of it where nothing is named.

* work: CPU seconds of an op, forward and backward, on a segment in the middle of a row that one
  document fills, by those of the same op on as many tokens alone (of full attention, by a rank's
  share of the whole row's), in the same run.
* products: FLOPs of the matrix products of the same ops on that segment, by those alone, where
  states are gathered and where they go from rank to rank (``parallel.context_scans``). They are
  counted on one process, with nobody to exchange with.
* bytes: what a layer of each kind sends on a rank with neighbours on both sides, forward and
  backward, by the plan for the same layer.
* stagger: slots that a chain of layers takes, one slot being a layer over a segment, against
  ``layers + ranks - 1``; each layer sleeps for a slot, so that cores do not matter. Beside it the
  number that follows from who waited for whom, whatever sleeping took.
* memory: the peak of a process that trains a step on one document segment by segment, by length.
* planned: seconds of a step on GPUs as the planner has them; nothing of it is measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.context_stagger import LAYERS, stagger
from pretrain.common.config_files import load_values
from pretrain.common.config_loader import build_config
from pretrain.common.errors import UserError
from pretrain.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from pretrain.data.sequences import Sequences, segment_of
from pretrain.model.block import Block, run_block
from pretrain.model.build import build_model
from pretrain.nn.mixers import registry
from pretrain.ops import (
    attention,
    delta_rule,
    linear_attention,
    short_convolution,
)
from pretrain.ops.chain import planned_chain
from pretrain.parallel.processes import (
    context_group,
    is_main_process,
    start_processes,
    stop_processes,
)
from pretrain.planner.estimate import Planner
from pretrain.planner.fake_group import CONTEXT, fake_group
from pretrain.planner.hardware import load_hardware
from pretrain.planner.messages import bytes_sent, group_of
from pretrain.planner.units import busiest_segment

PARTS = ("work", "products", "bytes", "stagger", "memory", "planned")
RANKS = {"work": 3, "bytes": 4, "stagger": 4}
TOKENS, ROUNDS = 2048, 5  # of a segment; the shortest round counts
WHOLE_ROW = "attention over 6 heads"
WIDTH, FEW = 256, 256  # of layers whose bytes are counted, and of their tokens


def main() -> None:
    """Measure what was asked for and print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    parts = options.parts or list(PARTS)
    if options.worker is not None:
        _work_as_rank(parts, options.worker)
        return
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} CPU cores, one thread to a process, torch "
        f"{torch.__version__}, gloo"
    )
    found: dict[str, Any] = {}
    for part, ranks in RANKS.items():
        if part in parts:
            found[part] = _on_ranks(ranks, part)
    if "work" in found:
        print("\nwork: CPU seconds of forward and backward on a segment, by those alone")
        print(f"{'op':<40}{'alone':>9}{'segment':>9}{'ratio':>7}")
        for name, (alone, segment) in found["work"].items():
            print(f"{name:<40}{alone:>9.3f}{segment:>9.3f}{segment / alone:>7.2f}")
    if "products" in parts:
        print("\nproducts: FLOPs of matrix products on a segment in the middle, by those alone")
        print(f"{'op':<40}{'gather':>8}{'ring':>7}   gather, at an end of the document")
        for name in _cases():
            if name != WHOLE_ROW:
                ratios = [products_ratio(name, ring=ring) for ring in (False, True)]
                print(f"{name:<40}{ratios[0]:>8.2f}{ratios[1]:>7.2f}", end="")
                delta = name.startswith("delta")
                ends = [products_ratio(name, ring=False, rank=rank) for rank in (0, 2) if delta]
                print("".join(f"{ratio:>7.2f}" for ratio in ends))
    if "bytes" in found:
        print(
            f"\nbytes: a layer of width {WIDTH} on {FEW} tokens of each of 4 ranks, float32; "
            "sequential cells in a chain"
        )
        heads = [f"{'sent':>14}{'planned':>14}{'ratio':>7}", f"{'in a ring':>12}{'ratio':>7}"]
        print(f"{'layer':<16}{heads[0]}{heads[1]}")
        for name, (sent, in_ring) in found["bytes"].items():
            planned = [_planned_bytes(name, RANKS["bytes"], ring) for ring in (False, True)]
            print(f"{name:<16}{sent:>14,.0f}{_by(sent, planned[0])}", end="")
            print(f"{in_ring:>12,.0f}{in_ring / planned[1]:>7.3f}" if in_ring != sent else "")
    if "stagger" in found:
        print(f"\nstagger: slots of {LAYERS} layers, measured (and by who waited for whom)")
        print(f"{'ranks':<8}{'expected':>9}{'forward':>15}{'backward':>15}{'checkpointed':>18}")
        for row in found["stagger"]:
            cells = [f"{seconds:.1f} ({slots:.0f})" for seconds, slots in row["slots"]]
            expected = LAYERS + row["ranks"] - 1
            print(
                f"{row['ranks']:<8}{expected:>9}{cells[0]:>15}{cells[1]:>15}{cells[2]:>18}"
                f"   checkpointed: {expected} slots of two"
            )
    if "memory" in parts:
        print("\nmemory: see also benchmarks/results/segments_cpu.txt")
        lengths = ["4096", "16384", "65536"]
        command = ["-m", "benchmarks.segments_cpu", "--segment", "1024", "--tokens", *lengths]
        subprocess.run([sys.executable, "-W", "ignore", *command], check=True)
    if "planned" in parts:
        found["planned"] = _planned()
        print(
            "\nplanned, nothing of it measured: a step on 1,048,576 tokens, documents of 131,072,"
        )
        print("410M parameters, bf16, H100s of one node; as many as context has")
        print(f"{'model':<18}{'context':>8}{'seconds':>9}{'tokens/s':>11}{'GB':>7}")
        for name, context, seconds, tokens, size in found["planned"]:
            print(f"{name:<18}{context:>8}{seconds:>9.1f}{tokens:>11,.0f}{size:>7.1f}")


def _on_ranks(ranks: int, part: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", "benchmarks.context_cpu", part, "--worker", str(file)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        subprocess.run([sys.executable, *command], check=True, env=environment)
        return json.loads(file.read_text())


def _work_as_rank(parts: list[str], file: Path) -> None:
    torch.set_num_threads(1)
    start_processes(ParallelConfig(context=int(os.environ["WORLD_SIZE"])))
    measure = {"work": _extra_work, "bytes": _bytes, "stagger": stagger}[parts[0]]
    found = measure()
    if is_main_process():
        file.write_text(json.dumps(found))
    stop_processes()


# Extra work of ops.

Op = Callable[..., tuple[Any, ...]]


def _cases(tokens: int = TOKENS) -> dict[str, tuple[Op, Callable[[], list[Tensor]]]]:
    """Return ops, each with what makes its tensors."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape)

    def keys(heads: int, dim: int, steps: int = 1) -> Tensor:
        return normalize(normal(1, tokens * steps, heads, dim), dim=-1)

    def decays(*shape: int) -> Tensor:
        return -0.1 * torch.rand(*shape)

    def delta(heads: int, key: int, value: int, steps: int, channels: bool) -> list[Tensor]:
        of_decay = (heads, key) if channels else (heads,)
        return [
            keys(heads, key),
            keys(heads, key, steps),
            normal(1, tokens * steps, heads, value),
            torch.rand(1, tokens * steps, heads),
            decays(1, tokens, *of_decay),
        ]

    def run_delta(steps: int, *tensors: Tensor, sequences: Sequences) -> tuple[Any, ...]:
        *others, decay = tensors
        return delta_rule(*others, log_decay=decay, num_householder=steps, sequences=sequences)

    def run_linear(*tensors: Tensor, sequences: Sequences) -> tuple[Any, ...]:
        *others, decay = tensors
        return linear_attention(*others, log_decay=decay, sequences=sequences)

    def only(op: Callable[..., Tensor]) -> Op:
        return lambda *tensors, sequences: (op(*tensors, sequences=sequences),)

    def linear(channels: bool) -> list[Tensor]:
        of_decay = (8, 64) if channels else (8,)
        return [keys(8, 64), keys(8, 64), normal(1, tokens, 8, 128), decays(1, tokens, *of_decay)]

    found: dict[str, tuple[Op, Callable[[], list[Tensor]]]] = {
        "linear attention, decay by head": (run_linear, partial(linear, False)),
        "linear attention, decay by channel": (run_linear, partial(linear, True)),
    }
    for name, heads, key, value, steps, channels in (
        ("delta rule 64 x 64", 8, 64, 64, 1, False),
        ("delta rule 64 x 128", 8, 64, 128, 1, False),
        ("delta rule 128 x 128", 4, 128, 128, 1, False),
        ("delta rule 256 x 512", 2, 256, 512, 1, False),
        ("delta rule 64 x 128, decay by channel", 4, 64, 128, 1, True),
        ("delta product 64 x 128, 2 steps", 4, 64, 128, 2, False),
    ):
        found[name] = partial(run_delta, steps), partial(delta, heads, key, value, steps, channels)
    found |= {
        "short convolution, 4 taps": (
            short_convolution,
            lambda: [normal(1, tokens, 512), normal(512, 4)],
        ),
        WHOLE_ROW: (
            only(attention),
            lambda: [normal(1, tokens, 6, 64) for _ in range(3)],
        ),
        "attention, window 256": (
            only(partial(attention, window=256)),
            lambda: [normal(1, tokens, 6, 64) for _ in range(3)],
        ),
    }
    return found


def _extra_work() -> dict[str, tuple[float, float]]:
    rank, size = dist.get_rank(), dist.get_world_size()
    pieces = segment_of(Sequences.from_lengths([TOKENS * size]), rank, size, dist.group.WORLD)
    found = {}
    for name, (op, make) in _cases().items():
        torch.manual_seed(rank)
        tensors = [x.requires_grad_() for x in make()]
        share = size if name == WHOLE_ROW else 1
        row = [torch.cat([x] * share, 1).detach().requires_grad_() for x in tensors]
        alone = Sequences.from_lengths([TOKENS * share])
        times = [
            min(_cpu_seconds(op, given, sequences) for _ in range(ROUNDS)) / by
            for given, sequences, by in ((row, alone, share), (tensors, pieces, 1))
        ]
        everyone: list[Any] = [None] * size
        dist.all_gather_object(everyone, times)
        found[name] = everyone[size // 2]  # a rank with neighbours on both sides
    return found


def _cpu_seconds(op: Op, tensors: list[Tensor], sequences: Sequences) -> float:
    dist.barrier()
    begun = time.process_time()
    output = op(*tensors, sequences=sequences)[0]
    output.backward(torch.ones_like(output))
    return time.process_time() - begun


def products_ratio(name: str, *, ring: bool, tokens: int = TOKENS, rank: int = 1) -> float:
    """Return the FLOPs of an op's products on one of a row's three segments, by those alone."""
    op, make = _cases(tokens)[name]
    group = fake_group(rank, 3, CONTEXT)
    row = Sequences.from_lengths([3 * tokens])
    counts = []
    with planned_chain(group):
        for sequences in (
            Sequences.from_lengths([tokens]),
            segment_of(row, rank, 3, group, ring=ring),
        ):
            torch.manual_seed(0)
            tensors = [x.requires_grad_() for x in make()]
            with FlopCounterMode(display=False) as counter:
                output = op(*tensors, sequences=sequences)[0]
                output.backward(torch.ones_like(output))
            counts.append(counter.get_total_flops())
    alone, segment = counts
    return segment / alone if alone else 1.0


# What layers send.


def _model(name: str) -> ModelConfig:
    return build_config(ModelConfig, {"hidden_size": WIDTH, "pattern": name}, "benchmark")


class _Sent(TorchDispatchMode):
    """Add up the bytes that this process sends, collectives counted as in a ring."""

    total = 0.0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        group = group_of(args) if function.namespace == "c10d" else None
        if group is not None:
            self.total += bytes_sent(function.__name__, args, group)
        return function(*args, **(kwargs or {}))


def _bytes() -> dict[str, tuple[float, float]]:
    """Return what the busiest rank sends for each layer, by gathered states and in a ring."""
    group, found = context_group(), {}
    assert group is not None
    size = group.size()
    row = Sequences.from_lengths([FEW * size])
    for name in sorted(registry()):
        if name == "sliced_attn":
            continue  # what it hands on grows, and no plan has that
        block = build_model(_model(name), 16, seed=0).blocks[0]
        assert isinstance(block, Block)
        both = []
        for ring in (False, True):
            pieces = segment_of(row, group.rank(), size, group, ring=ring)
            x = torch.randn(FEW, 1, WIDTH, requires_grad=True)
            with _Sent() as sent:
                run_block(block, x, pieces, 0, None)[0].sum().backward()
            totals: list[Any] = [None] * size
            dist.all_gather_object(totals, sent.total)
            both.append(totals[busiest_segment(1, size)])
        found[name] = both[0], both[1]
    return found


def _by(sent: float, planned: float) -> str:
    if math.isnan(planned):
        return f"{'not planned':>14}"
    return f"{planned:>14,.0f}{sent / planned:>7.3f}"


def _planned_bytes(name: str, size: int, ring: bool) -> float:
    """Return the bytes that the plan has for a layer of each of ``size`` ranks, nan without one."""
    tokens = FEW * size
    train = TrainConfig(steps=1, seq_len=tokens, precision="float32", global_batch_tokens=tokens)
    run = RunConfig("benchmark", _model(name), train=train)
    planner = Planner(run, 16, load_hardware("configs/hardware/cpu.yaml"))
    scans: Literal["gather", "ring"] = "ring" if ring else "gather"
    layout = ParallelConfig(
        context=size, micro_batch_size=1, context_cells="chain", context_scans=scans
    )
    try:
        unit = planner.units(layout, "none").blocks[name]
    except UserError:  # a state that grows
        return math.nan
    return unit.forward.context_bytes + unit.backward.context_bytes


def _planned() -> list[tuple[str, int, float, float, float]]:
    found = []
    for name in ("transformer", "gdn-hybrid-3to1", "m2rnn-hybrid", "para-gru"):
        values = load_values(f"configs/models/410m/{name}.yaml")
        for context in (2, 4, 8):
            train = TrainConfig(
                steps=1,
                seq_len=131_072,
                global_batch_tokens=1_048_576,
                activation_checkpointing="selective",
                precision="bf16",
            )
            model = build_config(ModelConfig, values["model"], name)
            planner = Planner(
                RunConfig(name, model, train=train),
                32_000,
                load_hardware("configs/hardware/h100.yaml"),
            )
            layout = ParallelConfig(context=context, micro_batch_size=1)
            estimate = planner.estimate(layout, context)
            found.append(
                (
                    name,
                    context,
                    estimate.step_seconds,
                    estimate.tokens_per_second,
                    estimate.peak_memory / 1e9,
                )
            )
    return found


if __name__ == "__main__":
    main()
