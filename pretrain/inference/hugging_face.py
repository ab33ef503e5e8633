"""A causal language model of Hugging Face behind the interface of our own loaded models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pretrain.common.errors import UserError
from pretrain.inference.generate import check_request, listed_texts


@dataclass
class HuggingFaceModel:
    """A model and its tokenizer as transformers loads them from ``source``, a name or folder."""

    model: Any
    tokenizer: Any
    source: str

    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int = 100,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> str:
        """Return ``prompt`` and up to ``max_tokens`` tokens after it.

        temperature: 0 takes the likeliest token; top_k, top_p: as for trained models. Raises
        UserError for a setting out of its range.
        """
        check_request(prompt, max_tokens, temperature, top_k, top_p, seed)
        if max_tokens == 0:
            return prompt
        ids = self._ids(prompt)
        chosen: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": max_tokens}
        if temperature > 0:
            chosen |= {"temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            tokens = torch.tensor([ids], device=self.model.device)
            found = self.model.generate(tokens, attention_mask=torch.ones_like(tokens), **chosen)
        new = self.tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True)
        return prompt + str(new)

    @torch.no_grad()
    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the log-likelihood of each text in nats, given the token that opens texts.

        Raises UserError where ``texts`` is no list of strings.
        """
        found = []
        for text in listed_texts(texts):
            ids = torch.tensor([self._ids(text)], device=self.model.device)
            logits = self.model(ids).logits[0, :-1].float().log_softmax(-1)
            found.append(float(logits.gather(1, ids[0, 1:, None]).sum()))
        return found

    def _ids(self, text: str) -> list[int]:
        """Return the tokens of a text, opened by the tokenizer's own first token or by BOS."""
        ids = list(self.tokenizer(text).input_ids)
        opens = self.tokenizer.bos_token_id
        if opens is None:
            opens = self.tokenizer.eos_token_id
        if opens is None:
            opens = self.model.config.bos_token_id
        if opens is None:
            raise UserError(
                f"hf:{self.source} has no token that opens a text, expected its tokenizer to name "
                "a BOS or EOS token"
            )
        return ids if ids[:1] == [opens] else [opens, *ids]


def load_hugging_face(
    source: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device,
    trust_remote_code: bool = False,
) -> HuggingFaceModel:
    """Load a causal model by its name or folder, in evaluation mode, on ``device``.

    trust_remote_code: run the code that comes with it, as our own exports of hybrids need. Raises
    UserError where transformers is missing or cannot load it.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise UserError(f"hf:{source} needs transformers: pip install transformers") from None
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # transformers, formats and model code raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"hf:{source}: could not be loaded ({reason})") from None
    return HuggingFaceModel(model.to(device).eval(), tokenizer, source)
