"""Laws of the whole loss curve under any learning-rate schedule.

In all of them the loss falls with a clock that the learning rate drives, and falls further, with
some delay, when the learning rate falls.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.scaling.curves import Curve
from evals.scaling.parameters import Array, Law, Parameter
from pretrain.common.errors import UserError

SUDDEN = 0.2  # share of the peak by which the rate must fall within the memory to determine it
# The multi-power law's memory and time are those of every change at every loss.
MOST_DROPS, MOST_BLOCKS = 24_000, 512

# beta: published ones lie between 0.19 and 0.35 (arXiv 2502.05172, 2404.10102, 2305.16264).
_SIZE_PARAMETERS = {
    "beta": Parameter("beta", "", "exponent of the size", 0.01, 2.0, (0.3,), prior=(0.28, 0.07)),
    "gamma": Parameter(
        "gamma", "", "exponent of the size in the annealing term", -1.0, 1.0, (0.0,)
    ),
    "eta": Parameter("eta", "", "exponent of the size in the progress term", -1.0, 1.0, (0.0,)),
}


@dataclass
class PreparedCurve:
    """A curve with what does not depend on a law's parameters.

    drops: (m,) steps after the warm-up before which the learning rate changed; by: (m,) how much it
    fell, in units of ``reference``; owner: (m,) index of the first logged step after the change.
    """

    name: str
    loss: Array
    step: NDArray[np.int64]
    lr: Array
    log_lr: Array
    drops: NDArray[np.int64]
    by: Array
    owner: NDArray[np.int64]
    size: float


class _CurveLaw(Law):
    """A law of the loss curve; learning rates are in units of ``reference`` (1: raw)."""

    def __init__(
        self,
        reference: float = 1.0,
        sized: bool = False,
        size_reference: float = 1.0,
        size_in_annealing: bool = False,
        size_in_progress: bool = False,
    ) -> None:
        self.reference, self.size_reference = reference, size_reference
        self.sized = sized
        self.size_in_annealing, self.size_in_progress = size_in_annealing, size_in_progress
        wanted = {"beta": sized, "gamma": size_in_annealing, "eta": size_in_progress}
        self.size_names = [name for name, used in wanted.items() if used]
        self.nonlinear = (*self.base_nonlinear(), *(_SIZE_PARAMETERS[n] for n in self.size_names))
        size = Parameter("B", "nats", f"excess at N = {size_reference:.3g}")
        self.linear = (*self.base_linear(), *([size] if sized else []))

    @abstractmethod
    def base_nonlinear(self) -> tuple[Parameter, ...]:
        """Return the non-linear parameters, without those of the size."""

    def base_linear(self) -> tuple[Parameter, ...]:
        """Return the linear parameters, without those of the size."""
        return (
            Parameter("L0", "nats", "irreducible loss"),
            Parameter("A", "nats", "excess where the clock shows 1"),
            Parameter("C", "nats", "gain by annealing from the reference learning rate to 0"),
        )

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments for this law."""
        return {
            "reference": self.reference,
            "sized": self.sized,
            "size_reference": self.size_reference,
            "size_in_annealing": self.size_in_annealing,
            "size_in_progress": self.size_in_progress,
        }

    def prepared(self, data: Curve) -> PreparedCurve:
        """Find the changes of a curve's learning rate; raises UserError for a missing size."""
        if (self.sized or self.size_names) and data.parameters is None:
            raise UserError(
                f"{data.name}: its number of parameters is not known, but the law includes N"
            )
        lr = data.lr[: data.step[-1] + 1] / self.reference
        change = np.zeros(len(lr))
        change[1:] = lr[:-1] - lr[1:]
        change[: data.warmup + 1] = 0.0
        drops = np.flatnonzero(change)
        # The first logged step that has seen the change.
        owner = np.searchsorted(data.step, drops, side="left")
        size = (data.parameters or 1.0) / self.size_reference
        return PreparedCurve(
            data.name,
            data.loss,
            data.step,
            lr,
            np.log(np.maximum(lr, 1e-30)),
            drops,
            change[drops],
            owner,
            size,
        )

    def doubts(self, values: dict[str, float], prepared: Sequence[PreparedCurve]) -> dict[str, str]:
        """Return a doubt on the memory, which smooth decay alone does not determine."""
        if "memory" not in values:
            return {}
        window = max(1, round(values["memory"]))
        most = 0.0
        for curve in prepared:
            lr = curve.lr / curve.lr.max()
            begin = np.maximum(curve.drops - window, 0)
            if len(begin):
                most = max(most, float((lr[begin] - lr[curve.drops]).max()))
        if most >= SUDDEN:
            return {}
        return {
            "memory": f"within it no learning rate falls by more than {most:.0%} of its peak; "
            "a run with an abrupt drop would determine it"
        }

    @abstractmethod
    def terms(self, theta: Array, curve: PreparedCurve) -> tuple[Array, Array, Array, Array]:
        """Return progress (n,), its derivatives (p, n), annealing (n,), its derivatives (p, n)."""

    def design(self, theta: Array, prepared: PreparedCurve) -> tuple[Array, Array]:
        """Return f (n, number of linear parameters) and its derivatives (len(theta), n, ...)."""
        base, n = len(theta) - len(self.size_names), len(prepared.loss)
        progress, d_progress, annealing, d_annealing = self.terms(theta[:base], prepared)
        exponents = dict(zip(self.size_names, theta[base:], strict=True))
        log_size = math.log(prepared.size)
        in_progress = math.exp(log_size * exponents.get("eta", 0.0))
        in_annealing = math.exp(log_size * exponents.get("gamma", 0.0))
        columns = [np.ones(n), progress * in_progress, -annealing * in_annealing]
        derivatives = np.zeros((len(theta), n, len(self.linear)))
        derivatives[:base, :, 1] = d_progress * in_progress
        derivatives[:base, :, 2] = -d_annealing * in_annealing
        if self.sized:
            columns.append(np.full(n, math.exp(-log_size * exponents["beta"])))
        for i, name in enumerate(self.size_names):
            column = {"beta": 3, "gamma": 2, "eta": 1}[name]
            sign = -1.0 if name == "beta" else 1.0
            derivatives[base + i, :, column] = sign * log_size * columns[column]
        return np.stack(columns, axis=1), derivatives


class AnnealingLaw(_CurveLaw):
    """The annealing law: L(s) = L0 + A S1^-alpha - C S2 [+ B N^-beta].

    S1: sum of the learning rates so far, warm-up included; S2: sum over the steps of the
    momentum-weighted fall of the learning rate, m_i = lambda m_(i-1) + (lr_(i-1) - lr_i), counted
    from the end of the warm-up. Learning rates enter as they are (reference 1), so that the
    constants compare with published ones.
    Source: Tissue, Wang, Wang, "Scaling Law with Learning Rate Annealing", arXiv 2408.11029.
    """

    name = "annealing"
    title = "Annealing law (Tissue et al.)"
    formula = "L0 + A S1^-alpha - C S2"
    source = "arXiv 2408.11029"

    def base_nonlinear(self) -> tuple[Parameter, ...]:
        """Return alpha and the other non-linear parameters, without those of the size."""
        return (
            Parameter("alpha", "", "exponent of S1", 0.05, 2.0, (0.3, 0.7)),
            Parameter(
                "memory",
                "steps",
                "over which S2 forgets, -1/log(lambda)",
                20.0,
                50_000.0,
                (100.0, 1000.0),
                log=True,
            ),
        )

    def base_linear(self) -> tuple[Parameter, ...]:
        """Return L0, A and C in the published units."""
        return (
            Parameter("L0", "nats", "loss that is left in the end"),
            Parameter("A", "nats", "excess where S1 is 1"),
            Parameter("C", "nats per S2", "gain by annealing"),
        )

    def derived(self, values: dict[str, float]) -> dict[str, float]:
        """Return the published constants."""
        return {"lambda": math.exp(-1 / values["memory"])}

    def terms(self, theta: Array, curve: PreparedCurve) -> tuple[Array, Array, Array, Array]:
        """Return progress (n,), its derivatives (p, n), annealing (n,), its derivatives (p, n)."""
        alpha, memory = theta[0], math.exp(theta[1])
        s1 = np.concatenate([[0.0], np.cumsum(curve.lr)])[curve.step]
        progress = s1**-alpha
        d_progress = np.stack([-np.log(s1) * progress, np.zeros_like(s1)])
        rate = 1 / memory
        decay = math.exp(-rate)
        clock = np.arange(len(curve.lr) + 1, dtype=float)
        sums, (moments,) = decayed_sums(curve, clock, rate, [clock])
        fallen = _fallen(curve)
        # sum over j = 0 .. i - k of lambda^j = (1 - lambda^(i - k + 1)) / (1 - lambda)
        top, bottom = fallen - decay * sums, 1 - decay
        # d(decay)/d(rate) = -decay; d(sums)/d(rate) = -moments; d(rate)/d(theta) = -rate
        d_top, d_bottom = decay * sums + decay * moments, decay
        d_rate = (d_top * bottom - top * d_bottom) / bottom**2
        d_annealing = np.stack([np.zeros_like(s1), -rate * d_rate])
        return progress, d_progress, top / bottom, d_annealing


class IntrinsicTimeLaw(_CurveLaw):
    """The intrinsic-time law, in which training has a clock that both terms share.

    L(s) = L0 + A (t/1000)^-alpha - C sum_k (x_(k-1) - x_k) (1 - exp(-(t_s - t_k) / memory)), with
    x = learning rate / reference and the clock t_s = sum over the steps before s of x^q. With q = 1
    the learning rate drives the clock, which holds before weight decay has acted; in equilibrium
    with it an AdamW step rotates the weights by sqrt(2 lr weight_decay) (arXiv 2305.17212), so
    q = 1/2. Runs lie between: 1/2 <= q <= 1, with a weak prior in the middle. The memory has a
    prior at the lambda of 0.99 to 0.999 published for the annealing law. ``reference`` is the
    highest learning rate of the fitted runs.
    Source: this project; six parameters, from the annealing law (arXiv 2408.11029) and the
    multi-power law (arXiv 2503.12811), whose annealing gain also uses the summed learning rate.
    """

    name = "intrinsic"
    title = "Intrinsic-time law"
    formula = "L0 + A t^-alpha - C sum_k dx_k (1 - exp(-(t - t_k)/memory)), dt = x^q"
    source = "this project, after arXiv 2408.11029, 2503.12811, 2305.17212"

    def base_nonlinear(self) -> tuple[Parameter, ...]:
        """Return alpha and the other non-linear parameters, without those of the size."""
        middle = math.sqrt(100 * 1000)
        return (
            Parameter("alpha", "", "exponent of the clock", 0.05, 2.0, (0.5,)),
            Parameter(
                "memory",
                "reference steps",
                "until an annealing step has acted",
                5.0,
                10_000.0,
                (80.0, 500.0),
                log=True,
                prior=(math.log(middle), math.log(10) / 2),
            ),
            Parameter("q", "", "the clock runs with lr^q", 0.5, 1.0, (0.6,), prior=(0.6, 0.06)),
        )

    def terms(self, theta: Array, curve: PreparedCurve) -> tuple[Array, Array, Array, Array]:
        """Return progress (n,), its derivatives (p, n), annealing (n,), its derivatives (p, n)."""
        alpha, rate, q = theta[0], math.exp(-theta[1]), theta[2]
        speed = np.exp(q * curve.log_lr)
        clock = np.concatenate([[0.0], np.cumsum(speed)])
        d_clock = np.concatenate([[0.0], np.cumsum(speed * curve.log_lr)])
        t, d_t = clock[curve.step] / 1000, d_clock[curve.step] / 1000
        progress = t**-alpha
        d_progress = np.stack(
            [-np.log(t) * progress, np.zeros_like(t), -alpha * progress / t * d_t]
        )
        sums, (by_clock, by_q) = decayed_sums(curve, clock, rate, [clock, d_clock])
        d_annealing = np.stack([np.zeros_like(t), -rate * by_clock, rate * by_q])
        return progress, d_progress, _fallen(curve) - sums, d_annealing


class MultiPowerLaw(_CurveLaw):
    """The multi-power law, with bounded parameters.

    L(s) = L0 + A S(s)^-alpha - B sum_k (lr_(k-1) - lr_k) (1 - (1 + C lr_k^-gamma S_k(s))^-beta),
    where S is the sum of the learning rates so far, including warm-up, and S_k(s) that from step k
    on. Without bounds C tends to 0 and beta to infinity. The clock counts 1,000 steps of the
    reference learning rate, which :meth:`derived` converts to the published units. Changes of the
    learning rate are summed in blocks of up to 16 steps, in long decays of more.
    Source: Luo et al., "A Multi-Power Law for Loss Curve Prediction", arXiv 2503.12811.
    """

    name = "multi_power"
    title = "Multi-power law"
    formula = "L0 + A S1^-alpha - B sum_k dlr_k (1 - (1 + C lr_k^-gamma S_k)^-beta)"
    source = "arXiv 2503.12811"
    block = 16

    def base_nonlinear(self) -> tuple[Parameter, ...]:
        """Return alpha and the other non-linear parameters, without those of the size."""
        return (
            Parameter("alpha", "", "exponent of the clock", 0.05, 2.0, (0.5,)),
            Parameter("c", "per 1000 steps", "speed of annealing", 0.03, 300.0, (3.0, 30.0), True),
            Parameter("power", "", "exponent of annealing", 0.05, 3.0, (0.4, 1.0), True),
            Parameter("gamma_lr", "", "speed goes with lr^-gamma", -0.5, 1.5, (0.4,)),
        )

    def derived(self, values: dict[str, float]) -> dict[str, float]:
        """Return the published constants."""
        gamma, unit = values["gamma_lr"], 1000 * self.reference
        return {
            "published A": values["A"] * unit ** values["alpha"],
            "published B": values["C"] / self.reference,
            "published C": values["c"] * self.reference**gamma / unit,
            "published beta": values["power"],
            "published gamma": gamma,
        }

    def prepared(self, data: Curve) -> PreparedCurve:
        """Find the changes of a curve's learning rate, and merge them into blocks."""
        found = super().prepared(data)
        drops, by = found.drops, found.by
        # Blocks of neighbours that the same logged step sees first.
        new = np.flatnonzero(np.diff(drops, prepend=-2) > 1)
        start = np.zeros(len(drops), dtype=np.int64)
        start[new] = new
        within = np.arange(len(drops)) - np.maximum.accumulate(start)
        block = self.block if len(drops) <= MOST_DROPS else math.ceil(len(drops) / MOST_BLOCKS)
        edge = (within % block == 0) | (np.diff(found.owner, prepend=-1) > 0)
        edges = np.flatnonzero(edge)
        if len(edges):
            counts = np.diff(np.append(edges, len(drops)))
            found.drops = drops[edges + counts // 2]
            found.by = np.add.reduceat(by, edges)
            found.owner = found.owner[edges]
        return found

    def terms(self, theta: Array, curve: PreparedCurve) -> tuple[Array, Array, Array, Array]:
        """Return progress (n,), its derivatives (p, n), annealing (n,), its derivatives (p, n)."""
        alpha, c, power, gamma = theta[0], math.exp(theta[1]), math.exp(theta[2]), theta[3]
        clock = np.concatenate([[0.0], np.cumsum(curve.lr)]) / 1000
        t = clock[curve.step]
        progress = t**-alpha
        d_progress = np.zeros((4, len(t)))
        d_progress[0] = -np.log(t) * progress
        annealing, d_annealing = np.zeros(len(t)), np.zeros((4, len(t)))
        if len(curve.drops):
            lr = np.maximum(curve.lr[curve.drops], 1e-12)
            since = np.maximum(t[:, None] - clock[curve.drops], 0.0)
            seen = np.arange(len(t))[:, None] >= curve.owner
            z = np.where(seen, since * (c * lr**-gamma), 0.0)
            log1p = np.log1p(z)
            left = np.exp(-power * log1p)
            annealing = (1 - left) @ curve.by
            slope = power * left / (1 + z) * z
            d_annealing[1] = slope @ curve.by
            d_annealing[2] = (left * log1p * power) @ curve.by
            d_annealing[3] = slope @ (-np.log(lr) * curve.by)
        return progress, d_progress, annealing, d_annealing


def _fallen(curve: PreparedCurve) -> Array:
    """Return by how much the learning rate has fallen (n,) since the warm-up."""
    return np.cumsum(np.bincount(curve.owner, curve.by, len(curve.step)))


def decayed_sums(
    curve: PreparedCurve, clock: Array, rate: float, others: list[Array]
) -> tuple[Array, list[Array]]:
    """Return E(s) = sum over changes k up to step s of by_k exp(-rate (clock_s - clock_k)).

    Also returns, for each other clock D, the same sum with a factor D_s - D_k; all are (n,). The
    cost is linear in the steps: a change is carried to the next logged step, and from there on
    together with all earlier ones.
    """
    n = len(curve.step)
    moments: list[Array] = [np.zeros(n) for _ in others]
    if not len(curve.drops):
        return np.zeros(n), moments
    at = clock[curve.step]
    carried = curve.by * np.exp(-rate * (at[curve.owner] - clock[curve.drops]))
    sums = np.bincount(curve.owner, carried, n)
    for moment, other in zip(moments, others, strict=True):
        ahead = other[curve.step][curve.owner] - other[curve.drops]
        moment += np.bincount(curve.owner, carried * ahead, n)
    decays = np.exp(-rate * np.diff(at)).tolist()
    total: list[float] = sums.tolist()
    for i, decay in enumerate(decays):
        total[i + 1] += decay * total[i]
    for moment, other in zip(moments, others, strict=True):
        gaps = np.diff(other[curve.step]).tolist()
        values: list[float] = moment.tolist()
        for i, decay in enumerate(decays):
            values[i + 1] += decay * (values[i] + gaps[i] * total[i])
        moment[:] = values
    return np.asarray(total), moments


CURVE_LAWS: dict[str, type[_CurveLaw]] = {
    law.name: law for law in (IntrinsicTimeLaw, AnnealingLaw, MultiPowerLaw)
}
