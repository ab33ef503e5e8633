"""The loss on held-out text."""

from __future__ import annotations

import torch

from pretrain.common.errors import UserError
from pretrain.data.validation import (
    ValidationScore,
    mean_score,
    share_of,
    validation_batches,
)
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
        if not batches:
            trainer.log.say(
                f"no validation: no source has {config.train.seq_len + 1} tokens of validation text"
            )
        rank, size = data_parallel_rank_and_size()
        self._batches = {source: share_of(b, rank, size) for source, b in batches.items()}
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
        due = step >= self.trainer.num_steps or (every > 0 and step % every == 0)
        return due and bool(self._batches)

    def _validate(self) -> None:
        trainer, state = self.trainer, self.trainer.state
        with trainer.evaluating(f"validating step {state.step}"):
            found = {
                source: ValidationScore(*trainer.engine.validate(batches, self._bytes_per_token))
                for source, batches in self._batches.items()
            }
        total = mean_score(found.values())
        values = {
            "step": state.step,
            "tokens": state.tokens,
            "valid_loss": total.loss,
            "valid_tokens": total.tokens,
            "valid_bits_per_byte": total.bits_per_byte,
        }
        by_source = ""
        if len(found) > 1:
            for source, score in found.items():
                values[f"valid_loss/{source}"] = score.loss
                values[f"valid_tokens/{source}"] = score.tokens
                values[f"valid_bits_per_byte/{source}"] = score.bits_per_byte
            by_source = f" ({', '.join(f'{s} {score.loss:.4f}' for s, score in found.items())})"
        trainer.log.record(values)
        bits = "" if total.bits_per_byte is None else f", {total.bits_per_byte:.4f} bits per byte"
        trainer.log.say(
            f"step {state.step}: validation loss {total.loss:.4f} nats per token{bits}{by_source}"
        )
