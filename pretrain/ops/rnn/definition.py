"""The classical cells' definition: a plain loop over tokens, through autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.rnn.cells import Cell
from pretrain.ops.shared.arguments import sequence_rows
from pretrain.ops.shared.checkpointed_recurrence import States
from pretrain.ops.shared.gradient_clipping import clip_gradient


def recurrent_product(h: Tensor, weight: Tensor) -> Tensor:
    """Multiply head by head: h ``[N, H, D]``, weight ``[H, D, G D]`` to ``[N, G, H, D]``."""
    product = torch.bmm(h.transpose(0, 1), weight)
    return product.unflatten(-1, (-1, h.shape[-1])).permute(1, 2, 0, 3)


def recurrent_rnn(
    kind: Cell,
    rows: Tensor,
    weight: Tensor,
    initial: States,
    sequences: Sequences,
    state_grad_clip: float | None,
) -> tuple[Tensor, States]:
    """Compute a classical cell by its definition, one token after another.

    rows ``[T, G, H, D]`` (biases added), weight ``[H, D, G D]`` to h ``[T, H, D]`` and the final
    states.
    """
    tokens, outputs, finals = rows.unbind(0), [], []
    for index, positions in enumerate(sequence_rows(sequences)):
        states = tuple(s[index : index + 1] for s in initial)
        for t in positions:
            states = kind.step(tokens[t][None], recurrent_product(states[0], weight), states)
            outputs.append(states[0][0])
            states = tuple(clip_gradient(s, state_grad_clip) for s in states)
        finals.append(states)
    output = torch.stack(outputs) if outputs else initial[0].new_zeros(0, *initial[0].shape[1:])
    if not finals:
        return output, initial
    return output, tuple(torch.cat(s) for s in zip(*finals, strict=True))
