"""A sequence mixer as a layer of anyone's own model."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences, check_fits, given_sequences
from pretrain.nn.mixers import LayerContext, Mixer, State
from pretrain.nn.parameters import DescribedModule, fill_parameters


class MixerLayer(DescribedModule):
    """Run a mixer on batch-first activations; ``mixer`` is the layer of our own models."""

    def __init__(self, mixer: Mixer):
        super().__init__()
        self.mixer = mixer

    def forward(
        self,
        x: Tensor,
        *,
        state: State | None = None,
        sequences: Sequences | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Map x ``[B, T, d]`` to y ``[B, T, d]`` and the state after each row's last token.

        state: what a call before returned, to continue from. sequences: with B = 1, where packed
        sequences begin and end, as a cu_seqlens tensor ``[N + 1]`` or a Sequences; the state then
        is of N sequences. cu_seqlens: the tensor by its own name. Raises ValueError where they do
        not fit x.
        """
        if x.ndim != 3:
            raise ValueError(f"x is {tuple(x.shape)}, expected [B, T, d]")
        packed = given_sequences("the layer", sequences, cu_seqlens)
        if packed is not None:
            check_fits("the layer", packed, *x.shape[:2])
        y, state = self.mixer(x.transpose(0, 1), sequences=packed, state=state)
        return y.transpose(0, 1), state

    def init_state(self, batch_size: int) -> State:
        """Return the state before any token."""
        return self.mixer.init_state(batch_size)


def make_layer(kind: type[Mixer], config: object, context: LayerContext, seed: int) -> MixerLayer:
    """Build a mixer with its initial weights, which depend on ``seed`` alone."""
    with torch.device("meta"):
        layer = MixerLayer(kind(config, context))
    fill_parameters(layer, seed, device=context.parallel.home)
    return layer
