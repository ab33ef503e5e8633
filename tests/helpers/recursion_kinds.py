"""Settings of every kind of loop over depth."""

from __future__ import annotations

from typing import Any

RECURRENT_DEPTH: dict[str, Any] = {
    "prelude": 1,
    "coda": 1,
    "times": 3,
    "adapter": True,
    "state_init": "random",
    "normalize_state": True,
}


KINDS: dict[str, dict[str, Any]] = {
    "looped": {"times": 3},
    "lora": {"prelude": 1, "coda": 1, "times": 3, "lora_rank": 2},
    "depth": RECURRENT_DEPTH,
    "scaled": {"prelude": 1, "times": 3, "residual_scales": True},
    "universal": {"prelude": 1, "times": 3, "step_signal": "sinusoidal"},
    "learned": {"coda": 1, "times": 3, "step_signal": "learned"},
    "halting": {"prelude": 1, "coda": 1, "times": 4, "step_signal": "sinusoidal", "halting": True},
    "published": {
        "times": 3,
        "step_signal": "coordinate",
        "position_offsets": 9,
        "halting": True,
        "halting_state": "copy",
    },
}
# What the blocks of the Universal Transformer are as published.
UNIVERSAL_BLOCKS: dict[str, Any] = {
    "block_norm": "sum",
    "norm": "layer",
    "mlp": {"kind": "relu", "ratio": 2},
}
