"""What a run tells: the live line, ``metrics.jsonl``, ``log.txt``, the loss curve, and MFU."""

from __future__ import annotations

import json
import math
import resource
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from pretrain.common.errors import UserError
from pretrain.common.files import write_bytes
from pretrain.common.metrics import merge_metrics
from pretrain.config import LoggingConfig
from pretrain.run_directory import read_metrics

# Dense bf16 matrix-multiply peaks in FLOP/s, by a part of the device's name, as the vendors' data
# sheets give them (figures "with sparsity" are twice as high and mean nothing here).
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak_flops(precision: str) -> float | None:
    """This process's device's dense peak, or None where it is not known."""
    if not torch.cuda.is_available() or precision != "bf16":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def peak_memory_bytes() -> int:
    """The most memory held so far: the GPU's where there is one, else this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class LayerMetrics:
    """What the layers of a model told since the last line of the log."""

    def __init__(self) -> None:
        self._found: dict[str, float] = {}

    def collect(self, engine: Any) -> None:
        """Take what the layers of ``engine`` have to tell now."""
        merge_metrics(self._found, engine.layer_metrics())

    def take(self) -> dict[str, float]:
        """All that was collected; starts anew."""
        found, self._found = self._found, {}
        return found


class RunLog:
    """The main process writes; on every other one this object does nothing."""

    def __init__(
        self, directory: Path, config: LoggingConfig, *, active: bool, num_steps: int, step: int
    ):
        self.directory, self.active, self.num_steps = directory, active, num_steps
        self._progress: Progress | None = None
        self._wandb: Any = None
        if not active:
            return
        self.console = Console(highlight=False, soft_wrap=True)
        self._metrics = directory / "metrics.jsonl"
        self._keep_metrics_up_to(step)
        self._open()
        self._text = (directory / "log.txt").open("a")
        if config.wandb != "disabled":
            self._wandb = _start_wandb(config, directory)
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
                transient=True,
            )
            self._task: TaskID = self._progress.add_task("", total=num_steps, numbers="starting")
            self._progress.update(self._task, completed=step)
            self._progress.start()

    def _keep_metrics_up_to(self, step: int) -> None:
        """Drop the lines of steps that will be done again, and a last line cut short."""
        if not self._metrics.exists():
            return
        kept = []
        for row in read_metrics(self.directory):
            if row["step"] <= step:
                kept.append(json.dumps(row) + "\n")
        write_bytes(self._metrics, "".join(kept).encode())

    def _open(self) -> None:
        self._file = self._metrics.open("a")

    def rewind(self, step: int) -> None:
        """Go on from an earlier step; the lines behind it go to metrics-rolled-back.jsonl."""
        if not self.active:
            return
        self._file.close()
        dropped = [row for row in read_metrics(self.directory) if row["step"] > step]
        with (self.directory / "metrics-rolled-back.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in dropped)
        self._keep_metrics_up_to(step)
        self._open()

    def say(self, message: str) -> None:
        """A line on the screen and in log.txt."""
        if self.active:
            self.console.print(message, markup=False)
            self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")
            self._text.flush()

    def record(self, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl; numbers that are not finite become null."""
        if self.active:
            clean = {
                k: None if isinstance(v, float) and not math.isfinite(v) else v
                for k, v in values.items()
            }
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()
            if self._wandb is not None:
                self._wandb.log(clean, step=values["step"])

    def step(self, values: dict[str, Any], seconds_left: float) -> None:
        """A logged training step: metrics.jsonl, and the live line or a plain one."""
        self.record(values)
        if not self.active:
            return
        numbers = (
            f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
            f"grad norm {values['grad_norm']:.3f}  {values['tokens_per_second']:,.0f} tokens/s"
        )
        if values["mfu"] is not None:
            numbers += f"  MFU {values['mfu']:.1%}"
            if values.get("hfu") is not None:
                numbers += f" ({values['hfu']:.1%} with recomputation)"
        numbers += f"  {_duration(seconds_left)} left"
        if self._progress is not None:
            self._progress.update(self._task, completed=values["step"], numbers=numbers)
        line = f"step {values['step']}/{self.num_steps}  {numbers}"
        if self._progress is None:
            print(line, flush=True)
        self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def close(self) -> None:
        """Give the screen back and finish the files."""
        if not self.active:
            return
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self._file.close()
        self._text.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(config: LoggingConfig, directory: Path) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"logging.wandb is '{config.wandb}', but wandb is not installed: pip install wandb"
        ) from None
    mode: Any = config.wandb
    return wandb.init(
        project=config.wandb_project,
        name=directory.name,
        dir=str(directory),
        mode=mode,
        id=directory.name,
        resume="allow",
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def plot_loss_curve(directory: Path, title: str, bigram_entropy: float | None) -> Path | None:
    """``plots/loss.png``: training loss, and validation in bits per byte; None without data."""
    from matplotlib.figure import Figure

    rows = read_metrics(directory)
    train = [(r["tokens"], r["loss"]) for r in rows if r.get("loss") is not None]
    valid = [
        (r["tokens"], r["valid_loss"], r["valid_bits_per_byte"])
        for r in rows
        if r.get("valid_loss") is not None
    ]
    if not train:
        return None
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*zip(*train, strict=True), color="tab:blue", linewidth=1, label="training")
    if valid:
        left.plot(
            *zip(*[v[:2] for v in valid], strict=True),
            "o-",
            color="tab:orange",
            markersize=4,
            label="validation",
        )
    left.set(xlabel="tokens", ylabel="loss (nats per token)", title=title)
    left.legend()
    points = [(tokens, bits) for tokens, _, bits in valid if bits is not None]
    if points:
        right.plot(*zip(*points, strict=True), "o-", color="tab:orange", label="validation")
        right.annotate(
            f"{points[-1][1]:.3f}",
            points[-1],
            textcoords="offset points",
            xytext=(-4, 8),
            ha="right",
        )
    if bigram_entropy is not None:
        right.axhline(
            bigram_entropy, color="gray", linestyle="--", label=f"byte bigrams {bigram_entropy:.2f}"
        )
    right.set(xlabel="tokens", ylabel="bits per byte", title="held-out text")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    path = directory / "plots" / "loss.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
