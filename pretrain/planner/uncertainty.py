"""How far a plan's speed may be off, from what published measurements of its kind show.

The factors are those of ``python -m benchmarks.planner_calibration``: 90 % of the measured runs of
a kind were within that factor of what was predicted for them by constants that were fitted without
their source.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.common.screen import readable
from pretrain.config import RunConfig
from pretrain.model.spec import block_specs
from pretrain.nn.mixers import registry
from pretrain.planner.hardware import Hardware

# (factor, measured runs) by kind of model; see benchmarks/results/planner_calibration.txt.
TRANSFORMER = (1.23, 154)
RECURRENT = (2.25, 26)
# Runs by torchtitan, on which nothing was fitted: the largest factor of so few; see
# benchmarks/results/planner_float8.txt.
FLOAT8 = (1.35, 7)
# Mixers, with what they share a kernel with, and GPUs of which there are measurements.
_MEASURED = {
    *("attn", "swa", "gdn", "deltanet", "retnet", "hgrn2", "linear_attn", "mamba2", "gla", "kda"),
    *("m2rnn", "delta_product"),
}
_GPUS = ("A100", "H100", "H200")


@dataclass(frozen=True)
class Uncertainty:
    """The range of a plan's speed.

    Attributes:
        factor: Speed is within 1 / factor and factor of the plan for 90 % of measured runs of its
            kind; None where nothing of the kind was measured.
        why: What that rests on, as a sentence.
    """

    factor: float | None
    why: str

    def low(self, value: float) -> float | None:
        """Return the lower end of the range of ``value``; None where it is not known."""
        return None if self.factor is None else value / self.factor

    def high(self, value: float) -> float | None:
        """Return the upper end of the range of ``value``; None where it is not known."""
        return None if self.factor is None else value * self.factor


def uncertainty(config: RunConfig, hardware: Hardware, context: int | None = None) -> Uncertainty:
    """Return how sure a plan of the run on the hardware is, of ``context`` segments if given."""
    if hardware.device == "cpu":
        return Uncertainty(None, "no published run on such a CPU was compared with its plan")
    if hardware.name.startswith("B200"):
        return Uncertainty(
            None,
            "one published run on B200 alone, an average over six days, has made its constants",
        )
    if not hardware.name.startswith(_GPUS):
        return Uncertainty(
            None,
            f"no published run on {hardware.name} was compared with its plan; benchmarks are "
            f"of {', '.join(_GPUS)}",
        )
    if (context or config.parallel.context) > 1:
        return Uncertainty(
            None, "no published run under context parallelism was compared with its plan"
        )
    called = {mixer: name for name, mixer in registry().items()}
    names = {called[spec.mixer] for spec in block_specs(config.model)}
    precision = config.train.precision
    if precision == "fp8" and names <= {"attn"} and config.model.moe is None:
        factor, number = FLOAT8
        return Uncertainty(
            factor,
            f"all of {number} published runs of transformers in torchao's fp8 were within a factor "
            f"of {factor:.3g} of their plan (benchmarks/results/planner_float8.txt)",
        )
    if precision != "bf16":
        of = "of other models in fp8 than transformers" if precision == "fp8" else f"in {precision}"
        return Uncertainty(None, f"no published run {of} was compared with its plan")
    unknown = sorted(names - _MEASURED)
    if unknown:
        return Uncertainty(
            None, f"no published run with {', '.join(unknown)} layers was compared with its plan"
        )
    if names <= {"attn", "swa"}:
        factor, number = TRANSFORMER
        kind = "transformers"
    else:
        factor, number = RECURRENT
        kind = "models with recurrent layers"
    return Uncertainty(
        factor,
        f"9 of 10 of {number} published runs of {kind} were within a factor of {factor:.3g} of "
        "their plan (benchmarks/results/planner_calibration.txt)",
    )


def with_range(value: float, sure: Uncertainty) -> str:
    """Return a number with its range: ``1,230 (910 to 1,660)``; alone where none is known."""
    low, high = sure.low(value), sure.high(value)
    if low is None or high is None:
        return _rounded(value, 3)
    return f"{_rounded(value, 3)} ({_rounded(low, 2)} to {_rounded(high, 2)})"


def _rounded(value: float, digits: int) -> str:
    return readable(float(f"{value:.{digits}g}"), digits)
