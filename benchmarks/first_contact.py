"""Say for benchmarks/first_contact.sh what runs, and what was reached.

    python -m benchmarks.first_contact versions FOLDER
    python -m benchmarks.first_contact targets FOLDER

``versions`` prints versions and hardware, and leaves in FOLDER how many tokens a micro-batch of the
Gated DeltaNet hybrids may have. ``targets`` prints what the stages' outputs in FOLDER, one file
NAME.txt each, measured of what this project aims at.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

TOKENS = 32768  # of a micro-batch, where the fast kernels run
FEWER_TOKENS = 8192  # of one of chunked Gated DeltaNet, which keeps 3 MB a token
GDN_TOKENS = "gdn-tokens"
NEEDED = (
    *("numpy", "yaml", "rich", "psutil", "jinja2", "matplotlib", "safetensors", "sentencepiece"),
    *("transformers", "einops", "megatron.core", "fla", "liger_kernel"),
    *("pytest", "xdist", "hypothesis"),
)
PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "megatron-core", "flash-linear-attention"),
    *("fla-core", "liger-kernel", "flash-attn"),
)


def print_versions(folder: Path) -> None:
    """Print versions, hardware and the kernels that ``auto`` takes, and what is not installed."""
    print(f"Python {platform.python_version()}, {platform.platform()}")
    print(", ".join(map(version, PACKAGES)))
    missing = [name for name in NEEDED if not installed(name)]
    if missing:
        print(f"not installed: {', '.join(missing)}; stages that need them will fail")
    import torch

    from pretrain.ops.backends import describe_backends
    from pretrain.ops.shared.flash_linear_attention import fla_fits

    tokens = TOKENS
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        print(
            f"{card.name}, {card.total_memory / 1e9:.0f} GB, {card.multi_processor_count} "
            f"multiprocessors, compute capability {card.major}.{card.minor}, CUDA "
            f"{torch.version.cuda}"
        )
        query = torch.empty(1, 128, dtype=torch.bfloat16, device="cuda")
        tokens = TOKENS if fla_fits(query, decay_per_head=True) else FEWER_TOKENS
    print(describe_backends())
    (folder / GDN_TOKENS).write_text(f"{tokens}\n")


def version(package: str) -> str:
    """Return a package's name and version, or that it is not there."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"


def installed(module: str) -> bool:
    """Return whether a module can be found, without its contents being run."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@dataclass(frozen=True)
class Step:
    """A model's row of benchmarks/train_gpu.py."""

    size: str
    model: str
    length: int
    tokens: int  # of a micro-batch
    speed: float  # tokens per second
    mfu: float | None


def training_steps(text: str) -> list[Step]:
    """Return the rows that benchmarks.train_gpu printed, those of models that failed left out."""
    found: list[Step] = []
    columns: list[str] = []
    tokens = TOKENS
    for line in text.splitlines():
        words = line.replace("peak GB", "peak_GB").split()
        if line.startswith("$ "):
            given = re.search(r"--tokens (\d+)", line)
            tokens, columns = int(given[1]) if given else TOKENS, []
        elif words[:1] == ["size"]:
            columns = words
        elif columns and len(words) >= columns.index("waits"):
            row = dict(zip(columns, words, strict=False))
            try:
                speed = float(row["tokens/s"].replace(",", ""))
                mfu = float(row["MFU"].rstrip("%")) / 100 if row["MFU"] != "-" else None
                found.append(Step(row["size"], row["model"], int(row["T"]), tokens, speed, mfu))
            except ValueError:  # a sentence about a model that failed
                continue
    return found


def against_published(text: str) -> list[tuple[int, float]]:
    """Return (T, times as fast as the stand-in) of M2RNN, printed by benchmarks.ops_gpu."""
    found, length, inside = [], 0, False
    for line in text.splitlines():
        words = line.split()
        inside = line.startswith("m2rnn, backend") or (inside and bool(words))
        if inside and words[0] == "triton":
            length = int(words[1])
        elif inside and words[0] == "ratio":
            found.append((length, float(words[1])))
    return found


def against_loop(text: str) -> list[tuple[str, int, float]]:
    """Return (cell, T, times as fast as the loop) of ParaRNN, printed by benchmarks.ops_gpu."""
    row = r"^(para_gru|para_lstm) +\d+ +\d+ +(\d+) +[\d.]+ \w+ +[\d.]+ +(\d+)x "
    return [(m[1], int(m[2]), float(m[3])) for m in re.finditer(row, text, re.MULTILINE)]


def targets(folder: Path) -> Iterator[str]:
    """Yield a line for each target: what was measured, and whether it is reached."""
    outputs = [path.read_text(errors="replace") for path in sorted(folder.glob("*.txt"))]
    steps = [step for text in outputs for step in training_steps(text)]
    alone = [s for s in steps if (s.size, s.model, s.length) == ("1b", "transformer", 4096)]
    best = max(alone, key=lambda s: s.speed, default=None)
    name = "transformer 1B, T = 4096"
    yield line(f"{name}, tokens/s", None if best is None else best.speed, 45_000, "{:,.0f}")
    yield line(f"{name}, MFU", None if best is None else best.mfu, 0.45, "{:.1%}")
    hybrid = "gdn-hybrid-3to1"
    for length, goal in ((4096, 0.95), (16384, 1.0)):
        text = f"Gated DeltaNet hybrid 3:1 1B / transformer, T = {length}"
        yield line(text, ratio(steps, hybrid, "transformer", length), goal, "{:.3f}")
    text = "hybrid with one M2RNN layer 1B / without, T = 4096"
    yield line(text, ratio(steps, "gdn-hybrid-one-m2rnn", "gdn-hybrid-7to1", 4096), 0.95, "{:.3f}")
    published = [pair for text in outputs for pair in against_published(text)]
    slowest = min(published, key=lambda pair: pair[1], default=None)
    at = "" if slowest is None else f", slowest at T = {slowest[0]}"
    text = f"M2RNN / published kernel's traffic, forward and backward{at}"
    yield line(text, None if slowest is None else slowest[1], 2.0, "{:.2f}")
    loops = [row for text in outputs for row in against_loop(text)]
    for cell, title in (("para_gru", "ParaGRU"), ("para_lstm", "ParaLSTM")):
        fastest = max((row for row in loops if row[0] == cell), key=lambda r: r[2], default=None)
        at = "" if fastest is None else f", best at T = {fastest[1]}"
        speed = None if fastest is None else fastest[2]
        yield line(f"{title} / sequential loop{at}", speed, 700, "{:,.0f}")


def ratio(steps: Iterable[Step], model: str, other: str, length: int) -> float | None:
    """Return a 1B model's speed over another's, with as many tokens in a micro-batch."""
    speeds: dict[tuple[str, int], float] = {}
    for step in steps:
        if step.size == "1b" and step.length == length:
            key = step.model, step.tokens
            speeds[key] = max(step.speed, speeds.get(key, 0.0))
    found = [
        (tokens, speed / speeds[other, tokens])
        for (name, tokens), speed in speeds.items()
        if name == model and (other, tokens) in speeds
    ]
    return max(found)[1] if found else None


def line(text: str, measured: float | None, goal: float, form: str) -> str:
    """Return one target's line."""
    if measured is None:
        return f"{text}: not measured, target {form.format(goal)}"
    reached = "reached" if measured >= goal else "not reached"
    return f"{text}: {form.format(measured)}, target {form.format(goal)}: {reached}"


def main() -> None:
    match sys.argv[1:]:
        case ["versions", folder]:
            print_versions(Path(folder))
        case ["targets", folder]:
            print("\n".join(targets(Path(folder))))
        case _:
            raise SystemExit("expected versions FOLDER or targets FOLDER")


if __name__ == "__main__":
    main()
