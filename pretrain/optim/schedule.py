"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math

from pretrain.config import ScheduleConfig


def learning_rate(config: ScheduleConfig, peak: float, step: int, num_steps: int) -> float:
    """Return the learning rate of optimizer step ``step``, counted from 0, of ``num_steps``.

    Warm-up is linear and reaches the peak with its last step. With p the share of the remaining
    steps that is done and f = final_ratio:

        constant    peak
        linear      peak (1 - (1 - f) p)
        cosine      peak (f + (1 - f) (1 + cos(pi p)) / 2)
        wsd         peak, then over the last decay_fraction of all steps down to f peak, with q the
                    share of the decay done: ``linear`` 1 - (1 - f) q; ``sqrt`` 1 - (1 - f) sqrt(q);
                    ``exponential`` f^q
        two_stage   peak, then f peak for the last decay_fraction of all steps: an abrupt drop, from
                    which the annealing law's memory can be measured (arXiv 2408.11029)
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    final = config.final_ratio
    progress = (step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1)
    progress = min(progress, 1.0)
    decay_steps = config.decay_fraction * num_steps
    done = min(max((step - (num_steps - decay_steps)) / decay_steps, 0.0), 1.0)
    if config.kind == "linear":
        return peak * (1 - (1 - final) * progress)
    if config.kind == "cosine":
        return peak * (final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2)
    if config.kind == "wsd":
        return peak * _decay(config.decay, done, final)
    if config.kind == "two_stage":
        return peak * (final if step >= num_steps - decay_steps else 1.0)
    return peak


def _decay(shape: str, done: float, final: float) -> float:
    if shape == "exponential":
        return final**done
    return 1 - (1 - final) * (math.sqrt(done) if shape == "sqrt" else done)
