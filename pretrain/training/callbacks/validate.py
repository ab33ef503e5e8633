"""The loss on held-out text."""

from __future__ import annotations

import torch

from pretrain.common.errors import UserError
from pretrain.data.validation import (
    ValidationScore,
    mean_score,
    share_of,
    validation_of_phases,
)
from pretrain.parallel.processes import data_parallel_rank_and_size
from pretrain.training.callbacks.base import Callback


class Validate(Callback):
    """Measure the validation loss every ``validation.every`` steps, and after the last one."""

    def on_train_start(self) -> None:
        """Read this rank's validation batches."""
        trainer, config = self.trainer, self.trainer.config
        batches, shares = validation_of_phases(
            trainer.data,
            trainer.phase_data,
            config.train,
            config.parallel.micro_batch_size,
            config.validation.tokens,
            config.data.prefix,
        )
        # The loss of the run is always that of its own data, whatever phases add.
        self._own = [label for label in trainer.data.labels if label in batches] or list(batches)
        self._shares = {}
        for phase, weights in zip(trainer.plan.phases, shares, strict=True):
            if config.phases and any(share != shares[0] for share in shares):
                self._shares[phase.name] = {k: w for k, w in weights.items() if k in batches}
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
        total = mean_score(found[label] for label in self._own)
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
        for phase, shares in self._shares.items():
            if shares:  # of the phase's sources, in its shares
                nats = sum(found[label].loss * share for label, share in shares.items())
                values[f"valid_loss@{phase}"] = nats / sum(shares.values())
        trainer.log.record(values)
        bits = "" if total.bits_per_byte is None else f", {total.bits_per_byte:.4f} bits per byte"
        trainer.log.say(
            f"step {state.step}: validation loss {total.loss:.4f} nats per token{bits}{by_source}"
        )
