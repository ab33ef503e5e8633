"""The order of samples whose rows read on from step to step (``train.carry_state``)."""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.common.errors import UserError
from pretrain.data.order import Mix, Order, Progress, blend, permute, shares_of


class ReadingOn(Order):
    """Row r of a step continues row r of the step before, through a span of one source.

    A span has ``steps`` windows. Spans are dealt as samples are else; a step of each mix has so
    many of ``rows``. Where a mix begins, every row goes to a span that none has come to before.
    Raises UserError where a source has no span, and where windows of mixes differ.
    """

    reads_on = True

    def __init__(self, mixes: Sequence[Mix], seed: int, rows: Sequence[int], steps: int):
        super().__init__(mixes, seed)
        self._rows = {mix.first: count for mix, count in zip(mixes, rows, strict=True)}
        self.steps = steps
        for mix in mixes:
            if mix.window != mixes[0].window:
                raise UserError(
                    f"with train.carry_state rows read on in windows of {mixes[0].window} tokens, "
                    f"but a later phase has windows of {mix.window}; expected a seq_len that "
                    f"divides {mixes[0].window}"
                )
            what = f"windows of {mix.window} tokens"
            what = "samples of train.seq_len" if mix.window == mix.seq_len else what
            for name, count in zip(mix.names, mix.windows, strict=True):
                if count < steps:
                    raise UserError(
                        f"{name}: its training split has {count} {what}, too few for "
                        f"train.carry_steps = {steps}; expected at most {count}"
                    )

    def span(self, mix: Mix, index: int) -> tuple[int, int]:
        """Return the number of the span that sample ``index`` is of, and its place in there.

        Rows begin their spans in the order of the rows, at equal distances in steps.
        """
        rows, samples = self._rows[mix.first], self._samples(mix)
        step, row = divmod(index, rows)
        turn, place = divmod(step + (rows - 1 - row) * samples // rows, samples)
        return turn * rows + row, place

    def locate(self, mix: Mix, index: int, before: Sequence[Progress]) -> tuple[int, int, int]:
        """Return (source, window of it, first token within that) of sample ``index``."""
        index, place = self.span(mix, index)
        source, position = blend(index, mix.weights)
        position += before[source].read // (self.steps * mix.window)
        count, rest = divmod(mix.windows[source], self.steps)
        epoch, position = divmod(position, count)
        key = self._key(mix.names[source], epoch)
        # What spans leave over is not always the same.
        shift = int.from_bytes(key[:8], "little") % (rest + 1)
        more, token = divmod(place * mix.seq_len, mix.window)
        return source, shift + permute(position, count, key) * self.steps + more, token

    def _read_of(self, mix: Mix, samples: int) -> list[int]:
        """Return the tokens of all spans that rows have come to."""
        rows = self._rows[mix.first]
        done = -(-samples // rows) * rows
        last = [self.span(mix, index)[0] for index in range(max(done - rows, 0), done)]
        spans = shares_of(max(last, default=-1) + 1, mix.weights)
        return [count * self.steps * mix.window for count in spans]

    def _samples(self, mix: Mix) -> int:
        """Return the number of samples of a span."""
        return self.steps * mix.window // mix.seq_len
