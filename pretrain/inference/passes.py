"""What a recursive model would say after each of its passes, all tokens going equally deep."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.model.block import FirstValues
from pretrain.model.language_model import LanguageModel
from pretrain.model.positions import token_positions


@torch.no_grad()
def outputs_by_pass(
    model: LanguageModel, tokens: Tensor, sequences: Sequences | None = None
) -> Iterator[Tensor]:
    """Yield hidden rows ``[N, d]`` after each pass, for ``score`` and ``next_logits``.

    tokens ``[B, T]``, or packed. Those after pass i are what the model with i passes computes; it
    must have a loop, in evaluation mode and without halting.
    """
    recursion, loop = model.recursion, model.loop
    assert recursion is not None
    firsts: dict[str, FirstValues] = {}
    x = model.embed(tokens, firsts)
    x = model.run_blocks(x, range(loop.start), sequences, firsts=firsts)
    state = recursion.initial(x)
    positions = None
    if recursion.config.step_signal == "coordinate":
        positions = recursion.coordinates(token_positions(tokens, sequences, None, model.context))
    for index in range(recursion.num_passes()):
        entering = recursion.pass_input(state, x, index, positions)
        state = model.run_blocks(entering, loop, sequences, depth=index, firsts=firsts)
        coda = range(loop.stop, len(model.blocks))
        rows = model.run_blocks(model.after_loop(state), coda, sequences, firsts=dict(firsts))
        yield rows.transpose(0, 1).flatten(0, 1)
