"""Causal models of Hugging Face: how they read and end texts, and our interface to one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pretrain.common.errors import UserError
from pretrain.common.files import write_json
from pretrain.inference.generate import check_request, listed_texts

_GENERATION = "generation_config.json"
# Generation settings that only transformers applies, with the value that does nothing.
_CHANGING = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "min_length": 0,
    "min_new_tokens": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": None,
    "penalty_alpha": None,
    "stop_strings": None,
}


@dataclass
class HuggingFaceText:
    """How a model reads and ends texts, by its ``tokenizer`` and its ``generation`` settings.

    Texts become tokens as transformers makes them: with the tokens that the tokenizer adds at their
    beginning and end, and with special tokens where a text spells them. ``source`` is the model's
    name, for messages.
    """

    tokenizer: Any
    generation: dict[str, Any]
    source: str

    @classmethod
    def load(cls, folder: Path) -> HuggingFaceText:
        """Read what :meth:`save` wrote.

        Raises UserError where transformers is missing, or the tokenizer has code of its own.
        """
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise UserError(
                f"{folder} has an imported model's tokenizer, which needs transformers: "
                "pip install transformers"
            ) from None
        try:
            generation = json.loads((folder / _GENERATION).read_bytes())
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{folder} holds no tokenizer that can be read without running code of its own: "
                f"{reason}; import the model again"
            ) from None
        return cls(tokenizer, generation, str(folder.parent))

    def save(self, folder: Path) -> None:
        """Write the tokenizer and the settings into ``folder``."""
        self.tokenizer.save_pretrained(folder)
        write_json(folder / _GENERATION, self.generation)

    @property
    def prefix_id(self) -> int:
        """Return the token before a text's first: BOS, or EOS. Raises UserError without either."""
        tokenizer = self.tokenizer
        for found in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            if found is not None:
                return int(found)
        if (found := self.generation.get("bos_token_id")) is None:
            raise UserError(
                f"{self.source} has no token that opens a text, expected its tokenizer to name "
                "a BOS or EOS token"
            )
        return int(found)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Return the ids that end a generated text: every EOS of the settings, the tokenizer's."""
        ends = self.generation.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        return frozenset(int(i) for i in (*ends, self.tokenizer.eos_token_id) if i is not None)

    @property
    def not_applied(self) -> dict[str, Any]:
        """Return the generation settings that change a greedy text and are not applied here."""
        found = {name: self.generation.get(name) for name in _CHANGING}
        return {n: v for n, v in found.items() if v is not None and v != _CHANGING[n]}

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Return the ids of ``text`` as lm-eval's ``hf`` has them.

        None adds the tokenizer's own tokens, unless the text begins with the one that opens it.
        """
        if add_special_tokens is None and text.startswith(self.tokenizer.decode([self.prefix_id])):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(text, **options))

    def opened(self, text: str) -> list[int]:
        """Return the ids of ``text`` behind the token that opens it."""
        ids = self.encode(text)
        return ids if ids[:1] == [self.prefix_id] else [self.prefix_id, *ids]

    def prompt(self, text: str) -> list[int]:
        """Return the ids of a text to continue; only one without BOS is opened by its EOS."""
        named = self.tokenizer.bos_token_id is not None
        return (self.encode(text) if named else []) or self.opened(text)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of ``ids``, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip_special))


@dataclass
class HuggingFaceModel:
    """A model and its tokenizer as transformers loads them from ``source``, a name or folder."""

    model: Any
    tokenizer: Any
    source: str

    @cached_property
    def text(self) -> HuggingFaceText:
        """How the model reads and ends texts."""
        settings = self.model.generation_config.to_diff_dict()
        return HuggingFaceText(self.tokenizer, settings, f"hf:{self.source}")

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
        ids = self.text.prompt(prompt)
        chosen: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": max_tokens}
        if temperature > 0:
            chosen |= {"temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0}
        if self.text.stop_ids:
            chosen["eos_token_id"] = sorted(self.text.stop_ids)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            tokens = torch.tensor([ids], device=self.model.device)
            found = self.model.generate(tokens, attention_mask=torch.ones_like(tokens), **chosen)
        return prompt + self.text.decode(found[0].tolist())[len(self.text.decode(ids)) :]

    @torch.no_grad()
    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the log-likelihood of each text in nats, given the token that opens texts.

        Raises UserError where ``texts`` is no list of strings.
        """
        found = []
        for text in listed_texts(texts):
            ids = torch.tensor([self.text.opened(text)], device=self.model.device)
            logits = self.model(ids).logits[0, :-1].float().log_softmax(-1)
            found.append(float(logits.gather(1, ids[0, 1:, None]).sum()))
        return found


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
