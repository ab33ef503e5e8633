"""Reduce logs of many losses to means, and notice losses that were smoothed before."""

from __future__ import annotations

import numpy as np

from evals.scaling.parameters import Array

SMOOTHED = -0.13  # autocorrelation of neighboring increments; -0.5 for independent losses
FEWEST, ENOUGH = 150, 300  # losses from which on it is known, for small noise and for any
SMALL, NONE = 3e-5, 1e-7  # increments' noise as a share of the loss
WINDOW = 20  # increments to either side whose median is the trend


def thin(step: Array, loss: Array, most: int) -> tuple[Array, Array]:
    """Return at most ``most`` means of neighboring losses of more than twice as many.

    Each is at the mean of its steps. At first the groups grow with the step, so that a loss that
    falls by a power law bends little within them; later they have equal widths.
    """
    if not most or len(step) <= 2 * most:
        return step, loss
    first, last = max(float(step[0]), 1.0), max(float(step[-1]), 2.0)
    at = np.maximum(step, first)
    share = 0.3 * np.log(at / first) / np.log(last / first) + 0.7 * (at - first) / (last - first)
    # The last loss belongs to the last group, so that no mean is of one loss alone.
    return means(step, loss, np.minimum(np.floor(share * most), most - 1))


def means(step: Array, loss: Array, group: Array) -> tuple[Array, Array]:
    """Return the mean step, rounded, and the mean loss of each run of equal ``group``."""
    begin = np.flatnonzero(np.diff(group, prepend=np.nan) != 0)
    counts = np.diff(np.append(begin, len(step)))
    middle = np.round(np.add.reduceat(step.astype(float), begin) / counts)
    return middle, np.add.reduceat(loss, begin) / counts


def smoothness(loss: Array) -> float | None:
    """Return the autocorrelation of increments of losses that look smoothed, or else None.

    Losses of independent batches have increments with an autocorrelation of -0.5; those of an
    exponential or a running mean have almost none. Few losses, or of a set that is always the same,
    may be smooth by nature.
    """
    loss = loss[len(loss) // 5 :]  # without the first, steepest part
    if len(loss) < FEWEST * 4 // 5:
        return None
    steps = np.diff(loss)
    padded = np.pad(steps, WINDOW, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * WINDOW + 1)
    noise = steps - np.median(windows, axis=1)
    size = 1.4826 * float(np.median(np.abs(noise)))
    relative = size / float(np.mean(loss))
    if relative <= NONE or (len(loss) < ENOUGH * 4 // 5 and relative > SMALL):
        return None
    noise = np.clip(noise, -4 * size, 4 * size)
    found = float(noise[1:] @ noise[:-1] / (noise @ noise))
    return found if found > SMOOTHED else None
