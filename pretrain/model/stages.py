"""Assignment of blocks to the stages of a pipeline: as even in FLOPs as undivided blocks allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from pretrain.config import ModelConfig
from pretrain.config.model_checks import check_stages
from pretrain.model.counts import outputs, training_flops_by_block
from pretrain.model.spec import block_specs


@dataclass(frozen=True)
class Stage:
    """A stage of a pipeline: consecutive blocks, by their numbers in the pattern.

    ``first`` also holds the embedding; ``last`` the final norm and the head, or with tied
    embeddings a copy of the embedding.
    """

    blocks: range
    first: bool = True
    last: bool = True


def whole_model(config: ModelConfig) -> Stage:
    """Return the only stage of a model that is not split."""
    return Stage(range(len(block_specs(config))))


def split_into_stages(
    config: ModelConfig, vocab_size: int, seq_len: int, count: int, where: str
) -> list[Stage]:
    """Split the model into ``count`` stages, first to last.

    The blocks of a recursive loop stay together: a pipeline goes through every stage once. With
    ``normalize_state``, ``halting`` or ``exit_weight`` so do the loop and all that follows it,
    which share parameters or the loss.

    Raises ConfigError where there are more stages than that leaves.
    """
    units = _units(config, where)
    most, why = most_stages(config, where)
    check_stages(most, why, count, where)
    flops = training_flops_by_block(config, seq_len)
    head = 3 * 2 * vocab_size * config.hidden_size
    costs = [float(sum(flops[i] for i in unit)) for unit in units]
    if _tied_to_head(config):
        costs[-1] += head * outputs(config.recursion)
    else:
        costs.append(head)
    ends = balance(costs, count)
    starts = [0, *ends[:-1]]
    stages = []
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        local = units[start:end]  # none, where the last stage is the head alone
        blocks = (
            range(local[0].start, local[-1].stop)
            if local
            else range(units[-1].stop, units[-1].stop)
        )
        stages.append(Stage(blocks, first=i == 0, last=i == count - 1))
    return stages


def most_stages(config: ModelConfig, where: str) -> tuple[int, str]:
    """Return the most stages that a model can be cut into, and why not more."""
    number = len(_units(config, where))
    most = number + (not _tied_to_head(config))  # the head may be a separate stage
    if config.recursion is None:
        return most, f"the model has {number} blocks"
    return most, f"a recursive loop cannot be cut, which leaves {number} units of blocks"


def balance(costs: Sequence[float], count: int) -> list[int]:
    """Return the ends of ``count`` consecutive, non-empty groups of ``costs``.

    The most expensive group is as cheap as possible and, among such groupings, the sum of squares
    is least.
    """
    total = [0.0, *accumulate(costs)]

    def divide(worth: float | None) -> tuple[float, list[int]]:
        """Minimise the largest group or, with a limit ``worth`` on it, the sum of squares."""
        best: list[tuple[float, list[int]] | None] = [(0.0, [])] + [None] * len(costs)
        for _ in range(count):
            longer: list[tuple[float, list[int]] | None] = [None] * (len(costs) + 1)
            for start, before in enumerate(best):
                if before is None:
                    continue
                for end in range(start + 1, len(costs) + 1):
                    cost = total[end] - total[start]
                    if worth is not None and cost > worth:
                        break
                    value = max(before[0], cost) if worth is None else before[0] + cost**2
                    found = longer[end]
                    if found is None or value < found[0]:
                        longer[end] = (value, [*before[1], end])
            best = longer
        result = best[-1]
        if result is None:
            raise ValueError(f"{len(costs)} costs do not make {count} groups")
        return result

    most_expensive, _ = divide(None)
    return divide(most_expensive * (1 + 1e-12))[1]


def _tied_to_head(config: ModelConfig) -> bool:
    recursion = config.recursion
    return recursion is not None and (
        recursion.normalize_state or recursion.halting or recursion.exit_weight > 0
    )


def _units(config: ModelConfig, where: str) -> list[range]:
    """Return the blocks in groups that no stage may cut."""
    number, recursion = len(block_specs(config, where)), config.recursion
    if recursion is None:
        return [range(i, i + 1) for i in range(number)]
    stop = number if _tied_to_head(config) else number - recursion.coda
    before = [range(i, i + 1) for i in range(recursion.prelude)]
    after = [range(i, i + 1) for i in range(stop, number)]
    return [*before, range(recursion.prelude, stop), *after]
