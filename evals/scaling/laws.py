"""All laws by name, and curve laws with units taken from the curves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evals.scaling.annealing_laws import CURVE_LAWS, AnnealingLaw
from evals.scaling.curves import Curve
from evals.scaling.parameters import Law
from evals.scaling.size_laws import SIZE_LAWS
from pretrain.common.errors import UserError

LAWS: dict[str, type[Law]] = {**CURVE_LAWS, **SIZE_LAWS}


def curve_law(
    name: str,
    curves: Sequence[Curve],
    sized: bool = False,
    size_in_annealing: bool = False,
    size_in_progress: bool = False,
) -> Law:
    """Return the law ``name``, in units taken from the curves.

    Learning rates are in units of the curves' highest (except in the annealing law) and N in units
    of their geometric mean. Curves of several sizes get one joint law, in which the size enters
    every term, unless the options choose some of them. Raises UserError where the law does not fit
    the number of the curves' sizes.
    """
    law = CURVE_LAWS[name]
    reference = 1.0 if law is AnnealingLaw else max(c.peak for c in curves)
    sizes = {c.parameters for c in curves}
    if not (sized or size_in_annealing or size_in_progress):
        if len(sizes) == 1:
            return law(reference)
        sized = size_in_annealing = size_in_progress = True
    if None in sizes:
        name = next(c.name for c in curves if c.parameters is None)
        raise UserError(f"{name}: its number of parameters is not known; give --parameters")
    if len(sizes) < 2:
        raise UserError("1 model size does not tell what size is worth; expected at least 2")
    middle = float(np.exp(np.mean([np.log(size or 1) for size in sizes])))
    return law(reference, sized, middle, size_in_annealing, size_in_progress)
