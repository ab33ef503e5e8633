"""The origin of a loss or gradient that is not finite."""

from __future__ import annotations

import dataclasses
import math
import socket

from pretrain.common.files import explain_write_error, is_refused_write
from pretrain.parallel.processes import (
    data_parallel_rank_and_size,
    gather,
    on_main_process,
    rank,
)
from pretrain.training.callbacks.base import Callback, Decision
from pretrain.training.engine import StepResult
from pretrain.training.origin import Event, Found, search
from pretrain.training.origin_text import blame_machine, describe_origin
from pretrain.training.replay import collect_weights, write_replay

_MOST_FILES = 3  # of one start of a run


class FindOrigin(Callback):
    """Run a step that is not finite again, say what made it, and write a file that repeats it.

    Of several in a row the first one.
    """

    _in_a_row, _files = 0, 0

    def after_step(self, result: StepResult) -> Decision | None:
        """Look for what made the step's loss or gradient; never decide."""
        if result.applied or (result.grad_norm is None and math.isfinite(result.loss)):
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        if self._in_a_row > 1:
            return None
        trainer = self.trainer
        step = trainer.state.step
        with trainer.paused(f"looking for what was not finite in step {step}"):
            sentence = self._look(result)
        trainer.log.say(sentence)
        return None

    def _look(self, result: StepResult) -> str:
        trainer, step = self.trainer, self.trainer.state.step
        offset, (data_rank, size) = trainer.state.offset, data_parallel_rank_and_size()
        suspect = not math.isfinite(float(trainer.engine.local_sum))
        for part in trainer.engine.parts:  # what mixers have measured before
            trainer.layer_metrics.add(part.mixer_metrics())
        batches = trainer.batches.micro_batches(step - 1, data_rank, size, offset=offset)
        found = search(trainer.engine, batches, trainer.config.seed, step - 1)
        everyone = gather((suspect, rank(), socket.gethostname()))
        suspects = [(who, host) for bad, who, host in everyone if bad]
        suspects = suspects or [(who, host) for _, who, host in everyone]
        norm = "" if result.grad_norm is None else f", gradient norm {result.grad_norm}"
        what = f"step {step}: loss {result.loss}{norm}: "
        if found.finite:
            carried = trainer.config.train.carry_state
            words = blame_machine(suspects)
            if carried:
                words = "run again without the states that rows carried, the step is finite"
        else:
            words = on_main_process(lambda: self._describe(found))
        if self._files == _MOST_FILES:
            return what + words
        self._files += 1
        event = found.event
        return what + words + self._write(what + words, 0 if event is None else event.data_rank)

    def _describe(self, found: Found) -> str:
        """Return the sentence's clause; the main process reads the batch to name the document."""
        trainer, event = self.trainer, found.event
        if event is None:
            return describe_origin(found, trainer.config.model, None)
        step, offset = trainer.state.step, trainer.state.offset
        _, size = data_parallel_rank_and_size()
        batches = trainer.batches.micro_batches(step - 1, event.data_rank, size, offset=offset)
        batch = batches[event.micro_batch]
        place = ""
        if event.token is not None:
            place = self._place(event, batch.tokens.shape[1], size)
        return describe_origin(found, trainer.config.model, batch, place)

    def _place(self, event: Event, tokens: int, size: int) -> str:
        trainer, step = self.trainer, self.trainer.state.step
        assert event.token is not None
        seq_len = trainer.plan.phase_at(step - 1).config.train.seq_len
        rows = tokens // seq_len
        row, token = divmod(event.token, seq_len)
        number = (event.micro_batch * size + event.data_rank) * rows + row
        offset = trainer.state.offset
        return trainer.batches.describe_place(step - 1, number, token, offset=offset)

    def _write(self, sentence: str, data_rank: int) -> str:
        """Write the file, and return a clause that names the command."""
        trainer, step = self.trainer, self.trainer.state.step
        weights = collect_weights(trainer.engine)
        trainer.writer.wait()
        directory, (_, size) = trainer.run_directory, data_parallel_rank_and_size()
        file, offset = directory.replay_file(step), trainer.state.offset
        phase = trainer.plan.phase_at(step - 1).config

        def write() -> None:
            write_replay(
                file,
                dataclasses.replace(trainer.config, train=phase.train),
                step=step,
                place=(data_rank, size),
                batches=trainer.batches.micro_batches(step - 1, data_rank, size, offset=offset),
                weights=weights,
                checkpoint=directory.last_checkpoint(),
                sentence=sentence,
            )

        try:
            on_main_process(write)
        except OSError as error:  # which shall not end a run that skips such steps
            if not is_refused_write(error):
                raise
            return f"; {explain_write_error(error, file)}, so no file repeats it"
        return f"; python -m pretrain replay {file} repeats it"
