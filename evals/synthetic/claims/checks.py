"""Measure what needs no training by itself, or more than the tests after it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evals.scaling import Curve, fit
from evals.synthetic.settings import SyntheticConfig, check_config
from evals.synthetic.training import learning_rate
from pretrain.common.config_loader import build_config
from pretrain.ops import para_gru, para_lstm

Train = Callable[[SyntheticConfig], dict[str, Any]]
_BINS = 40  # points of a curve after its warm-up


def para_rnn(settings: Mapping[str, Any], seed: int, train: Train) -> dict[str, float]:
    """Compare a ParaRNN cell by Newton's method with its definition, a loop over time.

    ``error``: largest difference of outputs and gradients in float64, over all lengths, relative to
    the largest of them. ``speed-up N``: CPU time of stepping through N tokens forward and backward
    over that of Newton's method, in float32; ``growth``: the last of these over the first.
    """
    cell: Callable[..., Any] = para_gru if settings["cell"] == "gru" else para_lstm
    torch.set_num_threads(1)
    ratios, error = {}, 0.0
    for length in settings["lengths"]:
        inputs = _inputs(settings, seed, length, torch.float64)
        outputs = [_run(cell, inputs, backend) for backend in ("sequential", "newton")]
        for one, other in zip(*outputs, strict=True):
            error = max(error, float((one - other).abs().max() / one.abs().max()))
        inputs = _inputs(settings, seed, length, torch.float32)
        slow, fast = (_cpu_seconds(cell, inputs, b) for b in ("sequential", "newton"))
        ratios[f"speed-up {length}"] = slow / fast
    values = list(ratios.values())
    return {"error": error, **ratios, "growth": values[-1] / values[0]}


def _inputs(
    settings: Mapping[str, Any], seed: int, length: int, dtype: torch.dtype
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    channels, rows = settings["channels"], [3, 2] if settings["cell"] == "lstm" else [3]
    u = torch.randn(1, length, 3, channels, generator=generator, dtype=dtype)
    weights = [torch.randn(n, channels, generator=generator, dtype=dtype) for n in rows]
    return [u, *(0.5 * torch.tanh(w) for w in weights)]


def _run(cell: Callable[..., Any], inputs: list[Tensor], backend: str) -> list[Tensor]:
    wanted = [x.clone().requires_grad_() for x in inputs]
    output, final = cell(*wanted, backend=backend)
    gradients = torch.autograd.grad((output * torch.cos(output.detach())).sum(), wanted)
    return [output.detach(), final.detach(), *gradients]


def _cpu_seconds(cell: Callable[..., Any], inputs: list[Tensor], backend: str) -> float:
    """Return the least of three, after a warm-up."""
    times = []
    for _ in range(4):
        started = time.process_time()
        _run(cell, inputs, backend)
        times.append(time.process_time() - started)
    return min(times[1:])


def annealing_law(settings: Mapping[str, Any], seed: int, train: Train) -> dict[str, float]:
    """Fit a law to the curves of some schedules, and predict that of another one.

    ``error`` is the mean relative error over the steps in which the new schedule's rate falls,
    ``end error`` that of the last point. With ``law: null`` the loss of the first schedule at the
    same step stands for a prediction.
    """
    known = [_curve(settings, changes, seed, train) for changes in settings["fitted"]]
    new = _curve(settings, settings["predicted"], seed, train)
    if settings["law"] is None:
        predicted = known[0].loss
    else:
        predicted = fit(settings["law"], known, samples=0).predict(new)
    errors = np.abs(predicted / new.loss - 1)
    falling = new.lr[new.step - 1] < new.peak
    return {"error": float(errors[falling].mean()), "end error": float(errors[-1])}


def _curve(
    settings: Mapping[str, Any], changes: Mapping[str, Any], seed: int, train: Train
) -> Curve:
    values = {**settings["training"], **changes, "seed": seed}
    config = build_config(SyntheticConfig, values, "training")
    check_config(config, "training")
    losses = np.array(train(config)["losses"])
    warmup = max(1, round(config.warmup * config.steps))
    edges = np.linspace(warmup, config.steps, _BINS + 1).astype(np.int64)
    means = np.array([losses[a:b].mean() for a, b in itertools.pairwise(edges)])
    middles = (edges[:-1] + edges[1:] + 1) // 2
    rates = np.array([learning_rate(config, step) for step in range(config.steps)])
    return Curve(config.decay, middles, means, rates, warmup)


CHECKS: dict[str, Callable[[Mapping[str, Any], int, Train], dict[str, float]]] = {
    "para_rnn": para_rnn,
    "annealing_law": annealing_law,
}
