"""What it costs to divide a row over processes: extra work, waiting, and memory by length.

``python -m benchmarks.context_cpu [work] [stagger] [memory] [--json FILE]`` measures on this
machine's CPU, over gloo; all three where none is named.

* work: CPU seconds of an op, forward and backward, on a segment in the middle of a row that one
  document fills, by those of the same op on as many tokens alone (of full attention, by a rank's
  share of the whole row's), in the same run.
* stagger: slots that a chain of layers takes, one slot being a layer over a segment, against
  ``layers + ranks - 1``; each layer sleeps for a slot, so that cores do not matter. Beside it the
  number that follows from who waited for whom, whatever sleeping took.
* memory: the peak of a process that trains a step on one document segment by segment, by length.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from pretrain.data.sequences import Segment, Sequences, segment_of
from pretrain.nn.mixers.base import Mixer, State
from pretrain.nn.mixers.over_segments import mix
from pretrain.ops import (
    attention,
    delta_rule,
    linear_attention,
    short_convolution,
)
from pretrain.parallel.segments import Handover, close_chains, open_chain

PARTS = ("work", "stagger", "memory")
TOKENS, ROUNDS = 1024, 5  # of a segment; the shortest round counts
WHOLE_ROW = "attention over 6 heads"
LAYERS, SLOT = 8, 0.05  # seconds


def main() -> None:
    """Measure what was asked for and print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
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
    for part, ranks in (("work", 3), ("stagger", 4)):
        if part in parts:
            found[part] = _on_ranks(ranks, part)
    if "work" in found:
        print("\nwork: CPU seconds of forward and backward on a segment, by those alone")
        print(f"{'op':<40}{'alone':>9}{'segment':>9}{'ratio':>7}")
        for name, (alone, segment) in found["work"].items():
            print(f"{name:<40}{alone:>9.3f}{segment:>9.3f}{segment / alone:>7.2f}")
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
    if options.json is not None:
        options.json.write_text(json.dumps(found))


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
    dist.init_process_group("gloo")
    found = _extra_work() if parts == ["work"] else _stagger()
    if dist.get_rank() == 0:
        file.write_text(json.dumps(found))
    dist.destroy_process_group()


# Extra work of ops.

Op = Callable[..., tuple[Any, ...]]


def _cases() -> dict[str, tuple[Op, Callable[[], list[Tensor]]]]:
    """Return ops, each with what makes its tensors."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape)

    def keys(heads: int, dim: int, steps: int = 1) -> Tensor:
        return normalize(normal(1, TOKENS * steps, heads, dim), dim=-1)

    def decays(*shape: int) -> Tensor:
        return -0.1 * torch.rand(*shape)

    def delta(heads: int, key: int, value: int, steps: int, channels: bool) -> list[Tensor]:
        of_decay = (heads, key) if channels else (heads,)
        return [
            keys(heads, key),
            keys(heads, key, steps),
            normal(1, TOKENS * steps, heads, value),
            torch.rand(1, TOKENS * steps, heads),
            decays(1, TOKENS, *of_decay),
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
        return [keys(8, 64), keys(8, 64), normal(1, TOKENS, 8, 128), decays(1, TOKENS, *of_decay)]

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
            lambda: [normal(1, TOKENS, 512), normal(512, 4)],
        ),
        WHOLE_ROW: (
            only(attention),
            lambda: [normal(1, TOKENS, 6, 64) for _ in range(3)],
        ),
        "attention, window 256": (
            only(partial(attention, window=256)),
            lambda: [normal(1, TOKENS, 6, 64) for _ in range(3)],
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


# How long a chain of layers waits.


class Clock:
    """The slots that have passed on this rank, by who waited for whom."""

    def __init__(self) -> None:
        self.now, self.again = 0.0, False

    def tick(self, not_before: float) -> float:
        """Sleep for a slot, which begins once this rank is free and its state is there."""
        time.sleep(SLOT)
        self.now = max(self.now, not_before) + 1
        return self.now


class _Slot(torch.autograd.Function):
    """A layer over a segment, whose state, and whose state's gradient, say when it was done."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, state: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
        ctx.clock = clock
        ctx.save_for_backward(x)  # which a checkpoint has to compute again
        # Computed again it waits for nothing: what it received is still there.
        not_before = 0.0 if clock.again else float(state.max())
        return x.view_as(x), torch.full_like(state, clock.tick(not_before))

    @staticmethod
    def backward(ctx: Any, d_x: Tensor, d_state: Tensor) -> tuple[Tensor, Tensor, None]:
        assert len(ctx.saved_tensors) == 1
        return d_x, torch.full_like(d_state, ctx.clock.tick(float(d_state.max()))), None


class SlotLayer(Mixer):
    """A mixer that takes a slot for each segment and is handed on by its state."""

    def __init__(self, clock: Clock):
        nn.Module.__init__(self)
        self.clock = clock

    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Pass x on a slot later."""
        before = self.init_state(1) if state is None else state
        y, done = _Slot.apply(x, before["done"], self.clock)
        return y, {"done": done}

    def init_state(self, batch_size: int) -> State:
        """Return that nothing has been done."""
        # A gradient of it wanted, as where it comes from another rank.
        return {"done": torch.zeros(batch_size, 1, requires_grad=torch.is_grad_enabled())}

    @classmethod
    def num_parameters(cls, config: Any, hidden_size: int) -> int:
        """Return that it has none."""
        return 0

    @classmethod
    def flops_per_token(cls, config: Any, hidden_size: int, seq_len: int) -> int:
        """Return that it does nothing."""
        return 0

    @classmethod
    def state_bytes(cls, config: Any, hidden_size: int, seq_len: int) -> int:
        """Return those of one number."""
        return 4


def _stagger() -> list[dict[str, Any]]:
    rank, found = dist.get_rank(), []
    for size in (2, dist.get_world_size()):
        group = dist.new_subgroups(size)[0]
        open_chain(group, timedelta(minutes=1))
        pieces = segment_of(Sequences.from_lengths([size]), rank % size, size, group)
        plain, checkpointed = (_slots(pieces, again) for again in (False, True))
        found.append({"ranks": size, "slots": [*plain, checkpointed[1]]})
    close_chains()
    return found


def _slots(pieces: Sequences, again: bool) -> list[tuple[float, float]]:
    """Return slots of the forward and of the backward pass, measured and counted."""
    clock, segment = Clock(), pieces.segment
    assert isinstance(segment, Segment)
    layers = [SlotLayer(clock) for _ in range(LAYERS)]
    x = torch.zeros(1, 1, 1, requires_grad=True)

    def forward() -> Tensor:
        y = x
        for layer in layers:
            handover = Handover()
            run = partial(_mixed, layer, sequences=pieces, handover=handover)
            y = checkpoint(run, y, use_reentrant=False) if again else run(y)
        return y

    found = []
    run: Callable[[], Tensor | None] = forward
    for _ in ("forward", "backward"):
        dist.barrier(group=segment.group)
        clock.now, begun = 0.0, time.perf_counter()
        y = run()
        times = torch.tensor([(time.perf_counter() - begun) / SLOT, clock.now])
        dist.all_reduce(times, dist.ReduceOp.MAX, group=segment.group)
        found.append((float(times[0]), float(times[1])))
        if y is not None:
            run, clock.again = y.sum().backward, True
    return found


def _mixed(layer: SlotLayer, x: Tensor, sequences: Sequences, handover: Handover) -> Tensor:
    return mix(layer, x, sequences, None, handover)[0]


if __name__ == "__main__":
    main()
