"""The options ``--state-...``: what is done to recurrent states in evaluation and generation."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from pretrain.common.argument_types import positive
from pretrain.common.errors import UserError

if TYPE_CHECKING:
    from pretrain.inference.load import LoadedModel

BY_TRAINING = "measured"
TEXTS = 16  # of the training length, by which limits are measured


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a command the options, all of which change nothing by default."""
    group = parser.add_argument_group(
        "states of recurrent layers", "mitigations without training, see docs/long-context.md"
    )
    group.add_argument(
        "--state-decay-scale",
        type=_number,
        help="multiplies log-decays: above 1 states forget more (1)",
    )
    group.add_argument(
        "--state-write-scale",
        type=_number,
        help="multiplies what is written: below 1 less is inserted (1)",
    )
    group.add_argument(
        "--state-norm",
        type=_limit,
        help=f"the largest norm of a head's state: a number, or '{BY_TRAINING}' for each head's "
        "own at the end of held-out texts of the training length (no limit)",
    )
    group.add_argument(
        "--state-norm-every", type=positive, help="tokens after which it is limited, each time (1)"
    )
    group.add_argument(
        "--state-window", type=positive, help="tokens that a state holds, the last ones (all)"
    )


def given_options(given: argparse.Namespace) -> dict[str, Any]:
    """Return the options that are given, as results record them."""
    names = ("decay_scale", "write_scale", "norm", "norm_every", "window")
    values = {f"state_{name}": getattr(given, f"state_{name}") for name in names}
    return {name: value for name, value in values.items() if value is not None}


def apply_options(loaded: LoadedModel, options: dict[str, Any], data: str | None = None) -> None:
    """Set what :func:`given_options` returned; ``data`` is where limits are measured.

    Raises UserError where a layer has no form of one of them, naming it.
    """
    if not options:
        return
    # Not above: a Hugging Face model, which takes none of this, must not meet our models' code.
    import torch

    from evals.held_out import running_text
    from pretrain.inference.mitigations import limit_by_training, mitigate
    from pretrain.nn.mixers.mitigations import Mitigations

    names = {"norm": "norm_limit"}
    values = {name.removeprefix("state_"): value for name, value in options.items()}
    values = {names.get(name, name): value for name, value in values.items()}
    if values.get("norm_limit") != BY_TRAINING:
        mitigate(loaded.model, Mitigations(**values))
        return
    del values["norm_limit"]
    length = loaded.run.train.seq_len
    text = running_text(loaded, data, TEXTS * length)
    if len(text) < length:
        raise UserError(
            f"state_norm is '{BY_TRAINING}', but there are {len(text):,} tokens of held-out text, "
            f"expected at least the training length of {length:,}; give --state-norm a number"
        )
    rows = torch.from_numpy(text[: len(text) // length * length]).view(-1, length)
    limit_by_training(loaded.model, list(rows), Mitigations(**values))


def mark(options: dict[str, Any]) -> str:
    """Return a suffix of file names that tells results with these options from others."""
    return "".join(f"-{name.replace('_', '-')}-{value}" for name, value in options.items())


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"found '{text}', expected a number above 0")
    return value


def _limit(text: str) -> float | str:
    try:
        return text if text == BY_TRAINING else _number(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error} or '{BY_TRAINING}'") from None
