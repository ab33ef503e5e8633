"""The order of samples whose rows read on from step to step (``train.carry_state``)."""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.common.errors import UserError
from pretrain.data.order import Mix, Order, Progress, blend, permute


class ReadingOn(Order):
    """Row r of a step continues row r of the step before, through a span of samples of one source.

    Spans have ``steps`` samples and are dealt as samples are else; a step has ``rows`` rows. There
    is one mix. Raises UserError where a source has no span.
    """

    reads_on = True

    def __init__(self, mix: Mix, seed: int, rows: int, steps: int):
        super().__init__([mix], seed)
        self.rows, self.steps = rows, steps
        for name, count in zip(mix.names, mix.windows, strict=True):
            if count < steps:
                raise UserError(
                    f"{name}: its training split has {count} samples of train.seq_len, too few for "
                    f"train.carry_steps = {steps}; expected at most {count}"
                )

    def span(self, index: int) -> tuple[int, int]:
        """Return the number of the span that sample ``index`` is of, and its place in there.

        Rows begin their spans in the order of the rows, at equal distances in steps.
        """
        step, row = divmod(index, self.rows)
        turn, place = divmod(step + (self.rows - 1 - row) * self.steps // self.rows, self.steps)
        return turn * self.rows + row, place

    def locate(self, mix: Mix, index: int, before: Sequence[Progress]) -> tuple[int, int, int]:
        """Return (source, window of it, 0) of sample ``index``."""
        index, place = self.span(index)
        source, position = blend(index, mix.weights)
        count, rest = divmod(mix.windows[source], self.steps)
        epoch, position = divmod(position, count)
        key = self._key(mix.names[source], epoch)
        # What spans leave over is not always the same.
        shift = int.from_bytes(key[:8], "little") % (rest + 1)
        return source, shift + permute(position, count, key) * self.steps + place, 0
