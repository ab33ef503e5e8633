"""The loss on held-out text."""

from __future__ import annotations

import math

import torch

from pretrain.common.errors import UserError
from pretrain.data.batches import share_of, validation_batches
from pretrain.parallel.processes import data_parallel_rank_and_size
from pretrain.training.callbacks.base import Callback


class Validate(Callback):
    """Measure the validation loss every ``validation.every`` steps, and after the last one."""

    def on_train_start(self) -> None:
        """Read this rank's validation batches."""
        trainer, config = self.trainer, self.trainer.config
        batches = validation_batches(
            trainer.data,
            config.train,
            config.parallel.micro_batch_size,
            config.validation.tokens,
        )
        self._active = bool(batches)
        if not batches:
            trainer.log.say(
                f"no validation: no source has {config.train.seq_len + 1} tokens of validation text"
            )
        self._batches = share_of(batches, *data_parallel_rank_and_size())
        self._bytes_per_token: torch.Tensor | None = None
        try:
            self._bytes_per_token = torch.from_numpy(trainer.data.tokenizer.bytes_per_token())
        except UserError as error:
            trainer.log.say(f"no bits per byte: {error}")

    def on_resume(self) -> None:
        """Validate if it was due and a signal or a kill came before the result."""
        if self._due() and "valid_loss" not in self.trainer.measured():
            self._validate()

    def between_steps(self) -> None:
        """Validate if it is due; where the run is about to stop, it does so when it resumes."""
        if self._due() and not self.trainer.stopping:
            self._validate()

    def _due(self) -> bool:
        step, every = self.trainer.state.step, self.trainer.config.validation.every
        return self._active and (
            step == self.trainer.num_steps or (every > 0 and step % every == 0)
        )

    def _validate(self) -> None:
        trainer, state = self.trainer, self.trainer.state
        with trainer.evaluating(f"validating step {state.step}"):
            loss, tokens, text_bytes = trainer.engine.validate(self._batches, self._bytes_per_token)
        bits = loss * tokens / math.log(2) / text_bytes if text_bytes else None
        trainer.log.record(
            {
                "step": state.step,
                "tokens": state.tokens,
                "valid_loss": loss,
                "valid_tokens": tokens,
                "valid_bits_per_byte": bits,
            }
        )
        shown = "" if bits is None else f", {bits:.4f} bits per byte"
        trainer.log.say(f"step {state.step}: validation loss {loss:.4f} nats per token{shown}")
