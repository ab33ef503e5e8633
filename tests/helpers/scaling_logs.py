"""Logs of one made-up run as other programs would write them."""

from __future__ import annotations

import numpy as np
import pandas

from evals.scaling import Reading, read_curves
from evals.scaling.schedules import parse_schedule, schedule_lr

STEPS = np.arange(10, 2001, 10)
SCHEDULE = "kind=cosine lr=1e-3 steps=2000 warmup_steps=105"


def losses(steps=STEPS, noise=0.0):
    drawn = np.random.default_rng(0).standard_normal(len(steps))
    return 3 + 2 * (np.asarray(steps) + 10.0) ** -0.4 + noise * drawn


def rates(steps=STEPS, text=SCHEDULE):
    return schedule_lr(*parse_schedule(text))[np.asarray(steps) - 1]


def write(path, columns, **options):
    path.parent.mkdir(exist_ok=True, parents=True)
    pandas.DataFrame(columns).to_csv(path, index=False, **options)
    return path


def one(*sources, **reading):
    (curve,), _ = read_curves(sources, Reading(**reading))
    return curve
