"""Imported models behind lm-eval's interface, with the figures that lm-eval's own ``hf`` gives.

Requests are read as the model's own tokenizer reads them: with the tokens that it adds, or without;
a request without context is opened by its BOS or EOS. Text ends at every EOS of the generation
settings.
"""

from __future__ import annotations

from typing import Any

from evals.harness.model import HarnessModel
from pretrain.common.errors import UserError
from pretrain.inference.hugging_face import HuggingFaceText
from pretrain.inference.load import LoadedModel
from pretrain.inference.score import Scorer


class ImportedHarnessModel(HarnessModel):
    """The scorer of an imported model and its own tokenizer behind lm-eval's interface."""

    def __init__(self, scorer: Scorer, loaded: LoadedModel, max_length: int) -> None:
        """Create it; ``loaded`` is imported, ``max_length`` as for other models."""
        if loaded.imported is None:
            raise UserError(
                f"--bos is 'model', but {loaded.checkpoint} was not imported; expected document "
                "or none"
            )
        super().__init__(scorer, loaded.tokenizer, max_length, bos="none")
        self.own: HuggingFaceText = loaded.imported
        self.stop_ids = self.own.stop_ids

    def settings(self) -> dict[str, Any]:
        """Return the settings, other than the model, that scores depend on."""
        opening = self.own.decode([self.own.prefix_id], skip_special=False)
        rule = f"as the model's tokenizer has it; {opening!r} opens a request without context"
        return {**super().settings(), "bos_rule": rule}

    @property
    def prefix_token_id(self) -> int:
        """The id that opens a request without context."""
        return self.own.prefix_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the ids of ``string`` with the tokens that the tokenizer adds."""
        return self.own.encode(string, add_special_tokens)

    def check_task(self, name: str, task: Any, *, sampled: bool) -> None:
        """Raise UserError for a task that cannot be scored as transformers would."""
        super().check_task(name, task, sampled=sampled)
        if task.OUTPUT_TYPE == "generate_until" and self.own.not_applied:
            found = ", ".join(f"{n} {v}" for n, v in self.own.not_applied.items())
            raise UserError(
                f"task '{name}' generates text, for which the model's generation settings ask for "
                f"{found}; runs do not apply that: score the model itself as hf:NAME"
            )

    def _end_text(self) -> str | None:
        end = self.own.tokenizer.eos_token_id
        return None if end is None else self.own.decode([end], skip_special=False)

    def _searched(self, prompt: list[int], ids: list[int]) -> str:
        return self.own.decode(ids, skip_special=False)

    def _generated(self, prompt: list[int], ids: list[int]) -> str:
        return self.own.decode(ids)
