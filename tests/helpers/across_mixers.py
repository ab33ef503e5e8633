"""Every mixer as a case of tests that divide a row over ranks, by its ops; see across_worker.py.

On more than two ranks the backward pass computes it again, as checkpointed blocks do.
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from pretrain.nn.mixers import LayerContext, registry
from pretrain.nn.mixers.base import without_states
from pretrain.nn.parameters import fill_parameters
from pretrain.parallel.context import ParallelContext
from tests.helpers.across_cases import Case, normal
from tests.helpers.small_mixers import SMALL

HIDDEN = 24
# Newton's method stops at 1e-11 by itself.
EXACT = {"para_gru": {"tolerance": 1e-13}, "para_lstm": {"tolerance": 1e-13}}


def of_mixer(name, number, settings):
    kind = registry()[name]
    config = kind.config_class(**settings, **EXACT.get(name, {})).resolve(HIDDEN)
    layer = kind(config, LayerContext(HIDDEN, 0.3, 0.3, ParallelContext(torch.float64)))
    fill_parameters(layer, seed=1)
    names = [name for name, _ in layer.named_parameters()]

    def output(x, parameters, sequences):
        values = dict(zip(names, parameters, strict=True))
        with without_states():
            y, _ = torch.func.functional_call(layer, values, (x,), {"sequences": sequences})
        return y

    def run(tensors, parameters, states, sequences):
        arguments = tensors[0].transpose(0, 1), parameters, sequences
        if sequences.segment is not None and sequences.segment.size > 2:
            y = checkpoint(output, *arguments, use_reentrant=False)
        else:
            y = output(*arguments)
        return y.transpose(0, 1), []

    return Case(
        f"{name} {number}",
        run,
        lambda g, total: [normal(g, 1, total, HIDDEN)],
        lambda g: [parameter.detach().clone() for parameter in layer.parameters()],
        layouts=("four", "short"),
    )


MIXERS = [
    of_mixer(name, number, settings)
    for name in registry()
    for number, settings in enumerate(SMALL.get(name, [{}]))
]
