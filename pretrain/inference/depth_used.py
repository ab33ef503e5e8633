"""The depth that tokens used: passes through the loop, and the FLOPs that they took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from pretrain.config import ModelConfig
from pretrain.model.counts import block_flops, block_lora_parameters, loop_counts
from pretrain.model.spec import BlockSpec, block_specs
from pretrain.nn.mixers.base import Mixer


@dataclass
class DepthUsed:
    """What each of some tokens used, int64 ``[N]``.

    Attributes:
        positions: The tokens of its text up to it, itself included.
        passes: Through the loop.
        outputs: Times that the coda and the head were computed to decide on its exit.
        carried: Passes that it did not make, but whose layers were told of it.
    """

    positions: np.ndarray
    passes: np.ndarray
    outputs: np.ndarray
    carried: np.ndarray

    def take(self, which: np.ndarray) -> DepthUsed:
        """Return that of some of the tokens, by their numbers or a mask."""
        return DepthUsed(*(getattr(self, f.name)[which] for f in fields(self)))

    @classmethod
    def together(cls, parts: Sequence[DepthUsed]) -> DepthUsed:
        """Return that of several calls, one after another."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))


def depth_summary(
    used: Sequence[DepthUsed], config: ModelConfig, vocab_size: int, times: int
) -> dict[str, Any]:
    """Return the mean passes of tokens, the share of each number, and mean FLOPs, of a loop.

    The FLOPs are those of the matrix products of what was computed, attention by each token's real
    context: (prelude + coda + head) + passes x loop, the coda and head as often again as the
    criterion read the output, and the mixers of later passes that were told of the token.
    """
    if not used:
        return {"tokens": 0}
    all_of_them = DepthUsed.together(used)
    passes = all_of_them.passes
    every = np.full_like(passes, times)
    nothing = np.zeros_like(passes)
    plain = DepthUsed(all_of_them.positions, every, nothing, nothing)
    return {
        "tokens": len(passes),
        "mean_passes": float(passes.mean()),
        "passes": {
            str(n): count / len(passes)
            for n, count in enumerate(np.bincount(passes).tolist())
            if count
        },
        "flops_per_token": float(flops(all_of_them, config, vocab_size).mean()),
        "flops_per_token_of_all_passes": float(flops(plain, config, vocab_size).mean()),
    }


def flops(used: DepthUsed, config: ModelConfig, vocab_size: int) -> np.ndarray:
    """Return the forward matrix-multiply FLOPs of each token, float64 ``[N]``."""
    positions, places = np.unique(used.positions, return_inverse=True)
    specs, recursion = block_specs(config), config.recursion
    assert recursion is not None
    loop = range(recursion.prelude, len(specs) - recursion.coda)
    costs = {spec.kind: _by_position(config, spec, positions) for spec in specs}

    def total(blocks: range) -> np.ndarray:
        zero = np.zeros(len(positions))
        return np.sum([costs[specs[i].kind] for i in blocks], axis=0, initial=0.0) + zero

    lora = sum(block_lora_parameters(config, specs[i]) for i in loop)
    inside = total(loop) + loop_counts(config)[1] + 2 * lora
    head = total(range(loop.stop, len(specs))) + 2 * vocab_size * config.hidden_size
    carried = np.zeros(len(positions))
    for spec in (specs[i] for i in loop):
        if recursion.lora_rank or spec.mixer.carried_state is Mixer.carried_state:
            carried += _of_mixer(config, spec, positions)
            carried += 2 * block_lora_parameters(config, spec, mixer_alone=True)
    before = total(range(loop.start))
    found: np.ndarray = (
        before[places]
        + used.passes * inside[places]
        + (1 + used.outputs) * head[places]
        + used.carried * carried[places]
    )
    return found


def _by_position(config: ModelConfig, spec: BlockSpec, positions: np.ndarray) -> np.ndarray:
    return _differences(lambda n: block_flops(config, spec, n), positions)


def _of_mixer(config: ModelConfig, spec: BlockSpec, positions: np.ndarray) -> np.ndarray:
    width = config.hidden_size
    return _differences(lambda n: spec.mixer.flops_per_token(spec.config, width, n), positions)


def _differences(per_token: Any, positions: np.ndarray) -> np.ndarray:
    """Return the FLOPs of the token at each position, from the mean over texts of each length."""
    found = [
        n * per_token(n) - (n - 1) * per_token(n - 1) if n > 1 else per_token(1)
        for n in positions.tolist()
    ]
    return np.array(found, dtype=np.float64)
