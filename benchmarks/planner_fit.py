"""Plans of the published measurements, and the search for the planner's constants on them.

``Calibration.fit`` finds the efficiencies of ``configs/hardware`` and the few constants of sources
(``SOURCES``) by least squares of log(predicted / measured), outliers weighing less. A run is
simulated once; other constants only price it again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.optimize import least_squares

from benchmarks.planner_rows import DATA, MeasuredKernel, MeasuredRun
from pretrain.ops.shared.fla_work import (
    CHUNK,
    HOST,
    STEP,
    delta_rule_counts,
    linear_attention_counts,
)
from pretrain.ops.shared.planning import Work, WorkKind
from pretrain.planner.cost import Cost, Kernel
from pretrain.planner.estimate import Planner
from pretrain.planner.figures import Estimate
from pretrain.planner.hardware import Hardware, load_hardware
from pretrain.planner.software import Software
from pretrain.planner.units import Units

_GENERATIONS = {
    "ampere": ("a100-40gb", "a100-80gb"),
    "hopper": ("h100", "h200", str(DATA / "h100-hbm2e.yaml")),
    "blackwell": ("b200",),
}
_CHECKPOINTING = ("none", "selective", "block")
_ATTENTION_HOST = (150.0, 250.0)  # microseconds of Python
_TOKENS = 16384  # of a micro-batch that is not known: a sequence of the longest rows


@functools.cache
def _file(name: str) -> Hardware:
    return load_hardware(name)


@dataclass
class Constants:
    """Hold what is fitted: values by (where, name), where ``where`` is hardware or a source."""

    values: dict[tuple[str, str], float] = field(default_factory=dict)

    def hardware(self, name: str) -> Hardware:
        """Return a hardware file with the constants in it."""
        base = _file(name)
        generation = next((g for g, names in _GENERATIONS.items() if name in names), "")
        changes: dict[str, Any] = {}
        attention = dict(base.attention_efficiency)
        for (where, what), value in self.values.items():
            if where in (name, generation, "all"):
                if what.startswith("flash"):
                    attention[what] = value
                elif hasattr(base, what):
                    changes[what] = value
        return dataclasses.replace(base, attention_efficiency=attention, **changes)

    def software(self, run: MeasuredRun) -> Software:
        """Return a run's software with the constants of its source in it."""
        changes: dict[str, Any] = {
            what: value for (where, what), value in self.values.items() if where == run.source
        }
        return dataclasses.replace(run.software, **changes)


# Fitted constants of sources, of which configs/hardware has no lines.
SOURCES = {
    ("fla", "product_time"): 2.503,
    ("fla", "delta_rule_time"): 3.079,
    ("fla", "linear_attention_time"): 1.0,
    ("m2rnn", "elementwise_time"): 0.3,
    ("m2rnn", "step_time"): 2.43,
}


# Where the search for each begins. Of a source: its kernels are older, or others.
_START = {
    **{(name, "matmul_efficiency"): 0.7 for names in _GENERATIONS.values() for name in names},
    **{(g, "flash2"): 0.35 for g in _GENERATIONS},
    ("ampere", "flash1"): 0.35,
    ("hopper", "flash1"): 0.2,
    **{(g, "recurrence_efficiency"): 0.4 for g in _GENERATIONS},
    ("all", "recurrence_bandwidth"): 0.6,
    ("all", "overlap_cost"): 0.4,
    **SOURCES,
}


class Calibration:
    """Runs and kernels, with their simulations."""

    def __init__(self, runs: Sequence[MeasuredRun], kernels: Sequence[MeasuredKernel]):
        self.runs, self.kernels = list(runs), list(kernels)
        self._units: dict[str, dict[object, Units]] = defaultdict(dict)

    def estimate(self, run: MeasuredRun, constants: Constants) -> tuple[Estimate, Hardware]:
        """Plan a run."""
        hardware = dataclasses.replace(
            constants.hardware(run.hardware), devices_per_node=run.devices_per_node
        )
        planner = Planner(
            run.config, run.vocab_size, hardware, constants.software(run), self._units[run.id]
        )
        return planner.estimate(run.config.parallel, run.devices), hardware

    def choose_batches(self, constants: Constants) -> None:
        """Give runs of an unknown micro-batch ``_TOKENS``, with the fastest checkpointing."""
        self.runs = [
            self._fastest(run, constants) if run.assumed_batch else run for run in self.runs
        ]

    def _fastest(self, run: MeasuredRun, constants: Constants) -> MeasuredRun:
        rows = max(_TOKENS // run.config.train.seq_len, 1)
        tried = [_with_batch(run, rows, checkpointing) for checkpointing in _CHECKPOINTING]
        plans = [(one, *self.estimate(one, constants)) for one in tried]
        fits = [(e.step_seconds, one) for one, e, h in plans if e.peak_memory <= h.memory_bytes]
        return min(fits, key=lambda pair: pair[0])[1] if fits else tried[-1]

    def run_ratios(self, constants: Constants, runs: Iterable[MeasuredRun]) -> list[float]:
        """Return log(predicted / measured tokens per second) of each run."""
        return [
            float(
                np.log(
                    self.estimate(run, constants)[0].tokens_per_second
                    / run.devices
                    / run.tokens_per_second
                )
            )
            for run in runs
        ]

    def fit(self, without: str = "") -> Constants:
        """Fit the constants on everything but a source."""
        runs = [run for run in self.runs if run.source != without]
        kernels = [k for k in self.kernels if k.source != without and is_fla(k)]
        names = [name for name in _START if _matters(name, runs, kernels)]
        start = np.log([_START[name] for name in names])
        weights = _weights([(r.source, r.hardware) for r in runs])
        kernel_weights = _weights([(k.source, k.hardware) for k in kernels])

        def errors(x: np.ndarray) -> np.ndarray:
            constants = Constants(dict(zip(names, map(float, np.exp(x)), strict=True)))
            speed = np.array(self.run_ratios(constants, runs))
            times = np.array([kernel_ratio(kernel, constants) for kernel in kernels])
            return np.concatenate([speed * weights, times * kernel_weights])

        upper = [np.log(_most(*name)) for name in names]
        lower = [np.log(_least(*name)) for name in names]
        found = least_squares(
            errors,
            start,
            bounds=(lower, upper),
            loss="soft_l1",
            f_scale=0.05,
            diff_step=1e-3,
            max_nfev=12,
        )
        return Constants(dict(zip(names, map(float, np.exp(found.x)), strict=True)))


def _most(where: str, what: str) -> float:
    """Return the largest value of a constant."""
    if (where, what) == ("hopper", "flash2"):
        return 0.42  # 400 TFLOP/s of its own benchmarks are .40 (arXiv 2407.08608)
    return 5.0 if what.endswith("time") else 1.0


def _least(where: str, what: str) -> float:
    """Return the smallest value of a constant: a source's older kernels are not the faster ones."""
    if where == "fla":
        return 1.0
    return 0.3 if what.endswith("time") else 0.05


def _matters(
    name: tuple[str, str], runs: Sequence[MeasuredRun], kernels: Sequence[MeasuredKernel]
) -> bool:
    """Return whether a measurement depends on a constant."""
    where, what = name
    if where == "all":
        return True
    of_runs = [
        r
        for r in runs
        if where in (r.hardware, r.source) or r.hardware in _GENERATIONS.get(where, ())
    ]
    if what.startswith("flash"):
        return any(r.software.attention == what for r in of_runs)
    if what == "recurrence_efficiency":
        of_kernels = any(k.hardware in _GENERATIONS[where] for k in kernels)
        return of_kernels or any(r.kind == "recurrent" for r in of_runs)
    return bool(of_runs)


def _weights(groups: Sequence[tuple[str, str]]) -> np.ndarray:
    """Return weights by which n measurements of a group count as the root of n."""
    sizes: dict[tuple[str, str], int] = defaultdict(int)
    for group in groups:
        sizes[group] += 1
    return np.array([sizes[group] ** -0.25 for group in groups])


def _with_batch(run: MeasuredRun, rows: int, checkpointing: str) -> MeasuredRun:
    config = run.config
    tokens = config.train.seq_len * rows * (run.devices // config.parallel.model_size)
    changed = dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, micro_batch_size=rows),
        train=dataclasses.replace(
            config.train,
            global_batch_tokens=tokens,
            activation_checkpointing=checkpointing,  # type: ignore[arg-type]
        ),
    )
    return dataclasses.replace(run, config=changed)


def is_fla(kernel: MeasuredKernel) -> bool:
    """Return whether a kernel is one that the planner describes: of fla, or FlashAttention 2."""
    return kernel.implementation.startswith(("fla", "flash attention 2"))


def kernel_ratio(kernel: MeasuredKernel, constants: Constants) -> float:
    """Return log(predicted / measured seconds) of a kernel of flash-linear-attention."""
    hardware = constants.hardware(kernel.hardware)
    total = 0.0
    for number, name in enumerate(("fwd", "bwd")):
        if name not in kernel.passes.split("+"):
            continue
        if kernel.op == "attention":
            pairs = kernel.tokens * kernel.longest * kernel.num_heads
            flops = 4.0 * pairs * kernel.key_dim * (0.5 if kernel.causal else 1.0)
            work = Work(
                flops * (1.0, 2.5)[number],
                kind="attention",
                width=kernel.key_dim,
                host=_ATTENTION_HOST[number],
            )
            width = kernel.num_heads * (3 * kernel.key_dim + kernel.value_dim)
            moved = 2.0 * kernel.tokens * width * (1, 2)[number]
        else:
            per_channel = kernel.op in ("kda", "gla")
            counts = (
                delta_rule_counts
                if kernel.op in ("gdn", "kda", "deltanet")
                else linear_attention_counts
            )(kernel.key_dim, kernel.value_dim, per_channel=per_channel)[number]
            times = kernel.tokens * kernel.num_heads
            chain = STEP * kernel.longest / CHUNK * (1 + number)
            kind: WorkKind = "linear_attention" if kernel.op in ("gla", "retnet") else "delta_rule"
            work = Work(counts[1] * times, kind=kind, chain=chain, host=HOST[number])
            moved = counts[0] * times
        cost = Cost(kernels={Kernel(work, moved, torch.bfloat16): 1.0})
        seconds, _ = hardware.cost_seconds(cost, Software())
        total += max(seconds, work.host * 1e-6) if kernel.host else seconds
    return float(np.log(total / kernel.seconds))
