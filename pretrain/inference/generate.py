"""Text from a model: the prompt in one pass, then token by token from the mixers' states."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from pretrain.common.errors import UserError
from pretrain.inference.exiting import ExitingModel
from pretrain.model.language_model import LanguageModel

LARGEST_SEED = 2**63  # torch's generators take no larger ones


@torch.no_grad()
def generate(
    model: LanguageModel | ExitingModel,
    prompt: list[int],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    vocab_size: int,
    stop_ids: Collection[int] = (),
    top_k: int | None = None,
    top_p: float | None = None,
) -> Iterator[int]:
    """Sample up to ``max_tokens`` ids after ``prompt``; see :func:`choose` for the rest.

    ``vocab_size`` is the tokenizer's: the embedding's padding rows are never sampled. Any of
    ``stop_ids`` ends the text and is not yielded. This process must hold the full model. A
    recurrent mixer keeps a state of one size, attention the keys and values of all tokens so far
    (of a window), and a loop over depth one of each for every pass.
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
            token = choose(last, temperature, generator, top_k, top_p)
            if token in stop_ids:
                return
            yield token
            tokens = torch.tensor([[token]], device=device)
    finally:
        model.train(was_training)


def check_request(
    prompt: object,
    max_tokens: int,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> None:
    """Raise UserError where these are no request for text after ``prompt``."""
    if not isinstance(prompt, str):
        raise UserError(f"generate: prompt is {prompt!r}, expected a string")
    if max_tokens < 0:
        raise UserError(f"generate: max_tokens is {max_tokens}, expected at least 0")
    if not (temperature == 0 or 1e-4 <= temperature < math.inf):
        raise UserError(f"generate: temperature is {temperature}, expected 0, or 1e-4 or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"generate: top_k is {top_k}, expected at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"generate: top_p is {top_p}, expected above 0 and at most 1")
    if not 0 <= seed < LARGEST_SEED:
        raise UserError(f"generate: seed is {seed}, expected 0 to 2^63 - 1")


def listed_texts(texts: Sequence[str]) -> list[str]:
    """Return the texts to score as a list; UserError where they are none, such as one string."""
    if isinstance(texts, str):
        raise UserError(f"score: texts is the string {texts[:40]!r}, expected a list of strings")
    found = list(texts)
    for text in found:
        if not isinstance(text, str):
            raise UserError(f"score: texts holds {text!r}, expected strings")
    return found


def choose(
    logits: Tensor,
    temperature: float,
    generator: torch.Generator,
    top_k: int | None = None,
    top_p: float | None = None,
) -> int:
    """Choose one id from logits ``[vocab]``: the likeliest at temperature 0, else drawn.

    top_k: only from the ``top_k`` likeliest; top_p: only from the fewest likeliest that together
    have at least this probability (arXiv 1904.09751), after top_k and the temperature.
    """
    if temperature == 0:
        return int(logits.argmax())
    order = torch.argsort(logits, descending=True, stable=True)[:top_k]
    weights = torch.softmax(logits[order] / temperature, -1)
    if top_p is not None:
        before = weights.cumsum(-1) - weights
        weights = torch.where(before < top_p, weights, 0.0)
    return int(order[torch.multinomial(weights, 1, generator=generator)])
