"""All laws by name, and curve laws with what they are measured in taken from the curves."""

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
    """The law ``name`` with learning rates in units of the highest of the curves (the annealing
    law's own: as they are) and, where ``sized``, N in units of their geometric mean.

    Raises UserError where it is to have N and the curves' sizes do not determine its exponent.
    """
    law = CURVE_LAWS[name]
    reference = 1.0 if law is AnnealingLaw else max(c.peak for c in curves)
    if not (sized or size_in_annealing or size_in_progress):
        sizes = {c.parameters for c in curves}
        if len(sizes) > 1:
            raise UserError(
                f"the curves have {len(sizes)} sizes, of which {law.title} knows nothing without "
                "--sized; or fit each size for itself"
            )
        return law(reference)
    sizes = {c.parameters for c in curves}
    if None in sizes:
        name = next(c.name for c in curves if c.parameters is None)
        raise UserError(f"{name}: its number of parameters is not known; give it by --parameters")
    if len(sizes) < 3:
        raise UserError(
            f"{len(sizes)} sizes do not determine the exponent of N beside the loss that is left: "
            "expected at least 3"
        )
    middle = float(np.exp(np.mean([np.log(size or 1) for size in sizes])))
    return law(reference, sized, middle, size_in_annealing, size_in_progress)
