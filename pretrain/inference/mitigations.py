"""Mitigations of recurrent states for a whole model; see :mod:`pretrain.nn.mixers.mitigations`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from pretrain.common.errors import UserError
from pretrain.model.block import Block
from pretrain.model.language_model import LanguageModel
from pretrain.model.spec import block_specs
from pretrain.nn.mixers.base import Mixer
from pretrain.nn.mixers.mitigations import Mitigations

# By setting: what a layer lacks that has no form of it.
_LACKS = {
    "decay_scale": "has no log-decay that can be scaled here",
    "write_scale": "has no write that can be scaled here",
    "norm_limit": "has no matrix state that may be scaled",
    "window": "has no window by subtraction, which needs a state that is only decayed and added to",
}


def mitigate(model: LanguageModel, wanted: Mitigations | None) -> None:
    """Set what is done to the recurrent states of ``model`` from now on; None: nothing.

    Layers that keep keys of tokens, as attention does, stay as they are. Raises UserError for a
    setting out of its range, and where a recurrent layer has no form of one that changes something.
    """
    layers = _recurrent(model)
    if wanted is not None:
        _check(wanted)
        changed = wanted.changed()
        names = [spec.name for spec in block_specs(model.model_config)]
        for index, mixer in layers.items():
            for setting, value in changed.items():
                if setting not in mixer.mitigable:
                    shown = "set" if isinstance(value, Tensor) else value
                    raise UserError(
                        f"state_{setting} is {shown}, but '{names[index]}' (block {index}) "
                        f"{_LACKS[setting]}"
                    )
        if changed and not layers:
            raise UserError(
                f"state_{next(iter(changed))} is set, but no layer of this model has a recurrent "
                "state"
            )
        if not changed:
            wanted = None
    for mixer in layers.values():
        mixer.mitigations = wanted


@torch.no_grad()
def limit_by_training(model: LanguageModel, texts: Sequence[Tensor], wanted: Mitigations) -> None:
    """Set ``wanted`` with a limit of its own for each head: its norm at the end of ``texts``.

    texts: ids ``[T]`` of the length that the model was trained on. The limit is the mean over
    them of the Frobenius norms, in a loop that of the pass where it is largest. Raises as
    :func:`mitigate` does.
    """
    mitigate(model, replace(wanted, norm_limit=1.0))  # refuses what cannot be
    mitigate(model, None)
    device = next(model.parameters()).device
    sums: list[Tensor] = []
    blocks = model.blocks_by_state()
    for text in texts:
        states = model.states(text[None].to(device))
        norms = [
            torch.linalg.vector_norm(state["recurrent"][0].double(), dim=(-2, -1))
            for state in (states[i] for i, b in enumerate(blocks) if b in _recurrent(model))
        ]
        sums = norms if not sums else [a + b for a, b in zip(sums, norms, strict=True)]
    limits: dict[int, Tensor] = {}
    for block, total in zip((b for b in blocks if b in _recurrent(model)), sums, strict=True):
        mean = total / len(texts)
        limits[block] = torch.maximum(limits[block], mean) if block in limits else mean
    for index, mixer in _recurrent(model).items():
        mixer.mitigations = replace(wanted, norm_limit=limits[index])


def _recurrent(model: LanguageModel) -> dict[int, Mixer]:
    """Return the mixers, by block, whose state is not of single tokens."""
    found = {}
    for index in model.stage.blocks:
        mixer = cast(Block, model.blocks[index]).mixer
        if not mixer.growing_states and not mixer.windowed_states:
            found[index] = mixer
    return found


def _check(wanted: Mitigations) -> None:
    limit = wanted.norm_limit
    numbers = {"decay_scale": wanted.decay_scale, "write_scale": wanted.write_scale}
    if limit is not None and not isinstance(limit, Tensor):
        numbers["norm_limit"] = limit
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise UserError(f"state_{name} is {value}, expected a number above 0")
    for name in ("norm_every", "window"):
        count = getattr(wanted, name)
        if count is not None and count < 1:
            raise UserError(f"state_{name} is {count}, expected at least 1")
    if limit is not None and wanted.window is not None:
        raise UserError(
            f"state_window is {wanted.window} and a limit of the states' norm is set, expected one "
            "of the two: a limited state has no window by subtraction"
        )
    if limit is None and wanted.norm_every != 1:
        raise UserError(
            f"state_norm_every is {wanted.norm_every}, but no limit of the states' norm is set"
        )
