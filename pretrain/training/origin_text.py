"""What was not finite, in one sentence."""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.config import ModelConfig
from pretrain.data.batch import Batch
from pretrain.model.spec import block_specs
from pretrain.training.origin import Event, Found

_ENDS = {
    "embedding": "the embedding",
    "final_norm": "the final norm",
    "head": "the head",
}


def describe_origin(found: Found, model: ModelConfig, batch: Batch | None, place: str = "") -> str:
    """Return a clause about what a step that was run again has made, which is not finite.

    ``batch`` is the micro-batch of the event; ``place``, where in the data its token lies.
    """
    event = found.event
    if event is None:
        what = found.sums or "the loss"
        return (
            f"run again, {'the gradient of ' * (found.sums is not None)}{what} is not finite, but "
            "everything that is added up to it is: the sum is too large"
        )
    what, where = f"the first {event.value} is", _where(event, model)
    made = f"{what} made in {where}"
    if event.parameter:
        made = f"{what} in the gradient of {event.module}, made by {where}"
    if event.weight is not None:
        made += f", whose weight {event.weight} is not finite"
    return f"{made}, on rank {event.rank} ({event.host}){_document(event, batch, place)}"


def blame_machine(suspects: Sequence[tuple[int, str]]) -> str:
    """Return a clause for a step that is finite when it is run again, on (rank, host) processes."""
    named = ", ".join(f"rank {rank} ({host})" for rank, host in suspects[:4])
    more = f" and {len(suspects) - 4} more" if len(suspects) > 4 else ""
    return (
        "run again, the same step is finite: arithmetic is not to blame, but perhaps the machine "
        f"of {named}{more}"
    )


def _where(event: Event, model: ModelConfig) -> str:
    name = event.module.rpartition(".")[0] if event.parameter else event.module
    first, *rest = name.split(".")
    if first == "blocks":
        number = int(rest[0])
        inner = ".".join(rest[1:]) or "the sum of its parts"
        where = f"block {number} ({block_specs(model)[number].name}), {inner}"
    else:
        where = _ENDS.get(first, name)
    return f"the backward pass of {where}" if event.backward else where


def _document(event: Event, batch: Batch | None, place: str) -> str:
    """Return where in the batch the event lies, as far as it is known."""
    clause = f", in micro-batch {event.micro_batch}"
    if event.data_rank:
        clause += f" of data-parallel rank {event.data_rank}"
    if event.token is None or batch is None:
        return clause
    document, begin = 0, 0
    for length in batch.sequences.lengths:
        if begin + length > event.token:
            break
        document, begin = document + 1, begin + length
    clause += f", document {document}, token {event.token - begin}"
    return f"{clause} ({place})" if place else clause
