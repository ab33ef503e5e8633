"""The options of generated texts that a task of lm-eval sets: what is supported, in what range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.common.errors import UserError

_MAX_GENERATED = 256  # tokens, where a task sets no limit; lm-eval's own default
# Options of other libraries, with the values at which they do nothing.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1.0,),
    "length_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "use_cache": (True, False),
}
SUPPORTED = "until, max_gen_toks, do_sample, temperature, top_k, top_p"


@dataclass(frozen=True)
class GenerationOptions:
    """The options of one task's texts; temperature 0 is greedy, None leaves ``top_k`` or p out."""

    until: list[str]
    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None


def generation_options(
    what: str, given: Mapping[str, Any] | None, end: str | None = None
) -> GenerationOptions:
    """Return the options of ``what`` from lm-eval's ``generation_kwargs``.

    ``end``: a text that stops every one besides those that are given.
    Raises UserError for an option that is not supported, rather than score without it, and for a
    value out of its range.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    try:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(given or {}), _MAX_GENERATED))
    except (TypeError, ValueError) as error:
        raise UserError(f"{what}: generation_kwargs {dict(given or {})}: {error}") from None
    known = {name: kwargs.pop(name, None) for name in SUPPORTED.split(", ")}
    if known["do_sample"] and known["temperature"] is None:
        known["temperature"] = 1.0  # as transformers does
    for name, value in kwargs.items():
        if value is None or value in _WITHOUT_EFFECT.get(name, ()):
            continue
        raise UserError(
            f"{what} sets {name} to {value!r} in its generation_kwargs, which is not supported: "
            f"its texts would be others; supported are {SUPPORTED}"
        )
    max_tokens, until = known["max_gen_toks"], [str(stop) for stop in known["until"] if stop]
    if end is not None and end not in until:
        until.append(end)
    if max_tokens < 1:
        raise _out_of_range(what, "max_gen_toks", max_tokens, "at least 1")
    if not known["do_sample"] or known["temperature"] == 0:
        return GenerationOptions(until, max_tokens, 0.0, None, None)
    temperature, top_k, top_p = float(known["temperature"]), known["top_k"], known["top_p"]
    if not 1e-4 <= temperature < math.inf:
        raise _out_of_range(what, "temperature", temperature, "0, or 1e-4 or more")
    if top_k is not None and not (isinstance(top_k, int) and top_k >= 0):
        raise _out_of_range(what, "top_k", top_k, "a whole number from 1, or 0 for no limit")
    if top_p is not None and not (isinstance(top_p, int | float) and 0 < top_p <= 1):
        raise _out_of_range(what, "top_p", top_p, "above 0 and at most 1")
    return GenerationOptions(until, max_tokens, temperature, top_k or None, top_p)


def _out_of_range(what: str, name: str, value: Any, expected: str) -> UserError:
    return UserError(
        f"{what} sets {name} to {value!r} in its generation_kwargs, expected {expected}"
    )
