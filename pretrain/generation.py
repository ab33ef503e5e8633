"""Text from a model: the prompt in one pass, then token by token from the mixers' states."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pretrain.models.language_model import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: list[int],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    vocab_size: int,
    stop_id: int | None = None,
) -> Iterator[int]:
    """Sample up to ``max_tokens`` ids after ``prompt``; temperature 0 takes the likeliest.

    ``vocab_size`` is the tokenizer's: the embedding's padding rows are never sampled. ``stop_id``
    ends the text and is not yielded. The model must be whole on this process.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([prompt], device=device)
    states = None
    try:
        for _ in range(max_tokens):
            logits, states = model.forward_with_state(tokens, states)
            last = logits[0, -1, :vocab_size].float().cpu()
            if temperature == 0:
                token = int(last.argmax())
            else:
                weights = torch.softmax(last / temperature, -1)
                token = int(torch.multinomial(weights, 1, generator=generator))
            if token == stop_id:
                return
            yield token
            tokens = torch.tensor([[token]], device=device)
    finally:
        model.train(was_training)
