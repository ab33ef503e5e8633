"""Time the training step of full models on one GPU: tokens/s, MFU, memory, and time by kernel.

    python -m benchmarks.train_gpu [--sizes 410m 1b] [--only NAME ...] [--lengths 4096 16384]
                                   [--tokens 32768] [--precision fp8] [--profile FOLDER] [--smoke]

Runs every model of configs/models in bfloat16, or with its projections in float8, through the
training engine: megatron-core's schedule, forward, backward, clipping, AdamW. Tokens are random,
``--tokens`` in a micro-batch (a multiple of every length; fewer need less memory), two
micro-batches in a step, rows of T as sequences. MFU: model FLOPs (matrix products, counting
attention's causal half) over the dense bf16 peak, in fp8 too. ``ratio``: tokens/s over the
transformer's of that size and length; the 7:1 hybrid with one M2RNN layer is also compared with
the one without, which has as many parameters (its MLP is wider instead, and its attention is at
other depths). ``waits``: how often a step made the host wait for the GPU, according to torch's sync
debug mode (the loss and the gradient's norm are read once each). ``--profile`` saves a picture of
one step by kernel. ``--smoke`` runs one tiny model on any machine; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pretrain.config import RunConfig, load_run_config
from pretrain.data.batch import Batch
from pretrain.data.sequences import Sequences
from pretrain.model.build import build_model
from pretrain.model.counts import count_model
from pretrain.model.float8 import multiply_in_float8
from pretrain.ops.backends import describe_backends
from pretrain.parallel.processes import start_processes
from pretrain.training.engine import Engine
from pretrain.training.metrics import peak_flops

MODELS = (
    "transformer",
    "gdn-hybrid-3to1",
    "gdn-hybrid-7to1",
    "gdn-hybrid-one-m2rnn",
    "m2rnn-hybrid",
    "delta-product",
    "para-gru",
    "para-lstm",
    "recursive-relaxed-2x",
)
MICRO_BATCHES = 2
SETTINGS = [
    *("name=benchmark", "data.path=none", "train.tokens=1000000"),
    "schedule.warmup_steps=0",  # the models' files have that of a long run
]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def batches(vocab_size: int, length: int, tokens: int) -> list[Batch]:
    made = []
    for _ in range(MICRO_BATCHES):
        ids = torch.randint(0, vocab_size, (2, tokens))
        packed = Sequences.of_rows(tokens // length, length, "cpu")
        made.append(Batch(ids[:1], ids[1:], torch.ones(1, tokens), packed))
    return made


def loaded(path: Path, length: int, tokens: int, precision: str) -> RunConfig:
    return load_run_config(
        str(path),
        [
            *SETTINGS,
            f"train.precision={precision}",
            f"train.seq_len={length}",
            f"train.global_batch_tokens={MICRO_BATCHES * tokens}",
            f"parallel.micro_batch_size={tokens // length}",
        ],
    )


def waits(step: Callable[[], Any]) -> int | str:
    """Count how often the host waited for the GPU in a step."""
    if not torch.cuda.is_available():
        return "-"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(w.message) for w in seen)


def measure(config: RunConfig, name: str, steps: int, tokens: int, profile: Path | None) -> Any:
    """Return (tokens per second, MFU or None, peak GB, waits)."""
    torch._dynamo.reset()  # what earlier models had compiled counts against a limit
    vocab_size, length = config.model.vocab_size or 32000, config.train.seq_len
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = build_model(config.model, vocab_size, seed=0, dtype=dtype)
    if config.train.precision == "fp8":
        multiply_in_float8(model, model.context)
    engine = Engine(model, config.optimizer, config.parallel)
    data, number = batches(vocab_size, length, tokens), 0

    def step() -> None:
        nonlocal number
        engine.begin_step(0, number)
        engine.train_step(data, 1e-4)
        number += 1

    for _ in range(3):
        step()
    synchronize()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        synchronize()
        times.append(time.perf_counter() - start)
    speed = MICRO_BATCHES * tokens / statistics.median(times)
    peak = peak_flops("bf16")
    flops = count_model(config.model, vocab_size, length).training_flops()
    memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    found = speed, peak and speed * flops / peak, memory, waits(step)
    if profile is not None:
        try:
            save_profile(step, profile / f"step-{name}-{length}.png", f"{name}, T = {length}")
        except Exception as problem:  # a picture that fails must not cost the figures
            print(f"no profile of {name}: {type(problem).__name__}: {problem}", flush=True)
    return found


def save_profile(step: Callable[[], Any], path: Path, title: str) -> None:
    """Draw the kernels that take most of the GPU's time in one step."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds) as seen:
        step()
        synchronize()
    spent: collections.Counter[str] = collections.Counter()
    gpu = torch.cuda.is_available()
    for event in seen.key_averages():
        # Operations' rows repeat the time of the kernels that they launched.
        if not gpu:
            spent[event.key] += int(event.self_cpu_time_total)
        elif event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            spent[event.key] += int(event.self_device_time_total)
    most = spent.most_common(20)
    rest = spent.total() - sum(time for _, time in most)
    names = [name[:60] for name, _ in most] + ["everything else"]
    values = [time / 1e3 for _, time in most] + [rest / 1e3]
    figure, axes = plt.subplots(figsize=(10, 7), layout="constrained")
    axes.barh(names[::-1], values[::-1])
    for row, value in enumerate(values[::-1]):
        axes.text(
            value,
            row,
            f" {value:.2f} ({value / max(sum(values), 1e-9):.0%})",
            va="center",
            fontsize=8,
        )
    axes.set_xlabel("milliseconds of one step")
    axes.set_title(f"{title}: {sum(values):.1f} ms in kernels")
    axes.tick_params(axis="y", labelsize=8)
    axes.margins(x=0.15)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="*", default=["410m", "1b"])
    parser.add_argument("--only", nargs="*", help="models whose name contains one of these")
    parser.add_argument("--lengths", nargs="*", type=int, default=[4096])
    parser.add_argument("--tokens", type=int, help="of a micro-batch; default: 32768")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--precision", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--profile", type=Path, help="folder for pictures of each model's step")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.smoke:
        raise SystemExit("there is no GPU here: --smoke runs a tiny model wherever it is")
    tokens = arguments.tokens
    if tokens is None:
        tokens = 128 if arguments.smoke else 32768
    lengths = [64] if arguments.smoke else arguments.lengths
    for length in lengths:
        if tokens < 1 or tokens % length:
            raise SystemExit(f"--tokens is {tokens}, expected a multiple of the length {length}")
    start_processes()
    names = [m for m in MODELS if not arguments.only or any(part in m for part in arguments.only)]
    paths = [
        (size, name, Path(f"configs/models/{size}/{name}.yaml"))
        for size in arguments.sizes
        for name in names
    ]
    if arguments.smoke:
        paths = [("tiny", "gdn-hybrid", Path("configs/models/tiny-gdn-hybrid.yaml"))]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"$ python -m benchmarks.train_gpu {' '.join(sys.argv[1:])}")
    print(f"{device}, {datetime.date.today()}, torch {torch.__version__}, {describe_backends()}")
    print(
        f"{'size':<5} {'model':<22} {'T':>6} {'tokens/s':>9} {'MFU':>6} {'peak GB':>8} "
        f"{'waits':>6} {'ratio':>6}"
    )
    for length in lengths:
        speeds: dict[tuple[str, str], float] = {}
        for size, name, path in paths:
            config = loaded(path, length, tokens, arguments.precision)
            try:
                speed, mfu, memory, waited = measure(
                    config,
                    f"{size}-{name}",
                    2 if arguments.smoke else arguments.steps,
                    tokens,
                    arguments.profile,
                )
            except Exception as problem:  # one model that fails must not cost the others' figures
                print(
                    f"{size:<5} {name:<22} {length:>6} {type(problem).__name__}: "
                    f"{(str(problem).strip().splitlines() or [''])[0]}",
                    flush=True,
                )
                continue
            finally:
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            speeds[size, name] = speed
            against = speeds.get((size, "transformer"))
            ratio = "" if against is None else f"{speed / against:.2f}"
            share = "-" if mfu is None else f"{mfu:.1%}"
            print(
                f"{size:<5} {name:<22} {length:>6} {speed:>9,.0f} {share:>6} {memory:>8.1f} "
                f"{waited!s:>6} {ratio:>6}",
                flush=True,
            )
        for size in arguments.sizes:
            pair = [speeds.get((size, f"gdn-hybrid-{kind}")) for kind in ("one-m2rnn", "7to1")]
            if pair[0] and pair[1]:
                print(
                    f"{size}, T = {length}: the hybrid with one M2RNN layer has "
                    f"{pair[0] / pair[1]:.3f} of the speed without"
                )


if __name__ == "__main__":
    main()
