"""This project's models behind lm-evaluation-harness's interface.

Tasks, prompts and metrics are lm-eval's. The BOS rule: with ``bos="document"`` every request begins
with the end-of-document token, as every document did in training; with ``"none"`` only a request
without context does, because its first token could not be scored otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from evals.tasks.family import COUNT, TextSettings
from pretrain.common.errors import UserError
from pretrain.data.tokenizer import Tokenizer
from pretrain.inference.score import Pair, Prompt, Scorer

BOS_RULES = ("document", "none")
_MAX_GENERATED = 256  # where a task sets no limit; lm-eval's own default
_BEFORE = 4  # prompt ids that a text is decoded with, because its first characters depend on them


class HarnessModel(TemplateLM):
    """A scorer and a tokenizer behind lm-eval's interface.

    ``max_length`` is the model's limit of input tokens; longer requests lose their beginning and
    are counted in ``cut``. ``length_option`` begins what sets it, in messages. Raises UserError for
    an unknown ``bos`` rule.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Tokenizer,
        max_length: int,
        *,
        bos: str = "document",
        length_option: str = "--max-length ",
    ) -> None:
        super().__init__()
        if bos not in BOS_RULES:
            raise UserError(f"--bos is '{bos}', expected {' or '.join(BOS_RULES)}")
        self.scorer, self.text, self.max_length, self.bos = scorer, tokenizer, max_length, bos
        self.cut, self._length_option = 0, length_option

    def text_settings(self, limit: int | None) -> TextSettings:
        """Return the settings of generated tasks, with as many documents as will be scored."""
        return TextSettings(
            lambda text: len(self._opened(self.tok_encode(text))),
            self.max_length,
            limit or COUNT,
            length_option=self._length_option,
        )

    def settings(self) -> dict[str, Any]:
        """Return the settings, other than the model, that scores depend on."""
        opened = "opened by the end-of-document token" if self.bos == "document" else "not opened"
        return {
            "bos_rule": f"each request is {opened}",
            "max_length": self.max_length,
            "tokenizer_sha256": self.text.sha256,
        }

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.scorer.device

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's hash, which lm-eval uses as a key of its caches."""
        return self.text.sha256

    @property
    def eot_token_id(self) -> int:
        """The id of the end-of-document token."""
        return self.text.eod_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the ids of ``string``, without special tokens."""
        return self.text.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of context and continuation, split where they diverge from the context's.

        A tokenizer may merge a continuation into the context's last token.
        """
        found: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        if found[1] or not continuation:
            return found
        joint = self.tok_encode(context + continuation)
        kept = 0
        while kept < len(joint) - 1 and joint[kept] == found[0][kept]:
            kept += 1
        return joint[:kept], joint[kept:]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitted(context, rest) for _, context, rest in requests]
        # An empty continuation (a choice without text) is certain.
        some = [pair for pair in pairs if pair.continuation]
        found = iter(self.scorer.log_likelihoods(some))
        results = [next(found) if pair.continuation else (0.0, True) for pair in pairs]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], result)
        return results

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood in nats, and whether it is the greedy one."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return each text's log-likelihood in nats, over disjoint windows."""
        pairs, counts = list[Pair](), list[int]()
        for (string,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(string),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found = [Pair(*make_disjoint_window(window)) for window in windows]
            pairs += found
            counts.append(len(found))
        values = iter(self.scorer.log_likelihoods(pairs))
        totals = [sum(next(values)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return a generated text for each prompt, up to its stop strings or token limit."""
        prompts, stops = list[Prompt](), list[list[str]]()
        end = self.text.eod_id
        for number, (text, options) in enumerate(request.args for request in requests):
            kwargs: dict[str, Any] = dict(normalize_gen_kwargs(options, _MAX_GENERATED))
            stops.append(handle_stop_sequences(kwargs.pop("until", None), eos=None))
            longest = int(kwargs.pop("max_gen_toks"))
            self._check_room("a task", longest)
            ids = self._opened(self.tok_encode(text))
            prompts.append(
                self._prompt(
                    self._trimmed(ids, self.max_length - longest),
                    longest,
                    stops[-1],
                    kwargs,
                    number,
                )
            )
        made = self.scorer.generate(prompts)
        texts = []
        for request, prompt, ids, stop in zip(requests, prompts, made, stops, strict=True):
            ids = ids[: ids.index(end)] if end in ids else ids
            text = postprocess_generated_text(self._text_after(prompt.ids, ids), stop, None)
            self.cache_hook.add_partial("generate_until", request.args, text)
            texts.append(text)
        return texts

    def check_task(self, name: str, task: Any, *, sampled: bool) -> None:
        """Raise UserError for a task whose texts are too long or, unless ``sampled``, sampled."""
        if task.OUTPUT_TYPE != "generate_until":
            return
        given = dict(task.config.generation_kwargs or {})
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, _MAX_GENERATED))
        self._check_room(f"task '{name}'", int(kwargs["max_gen_toks"]))
        if kwargs.get("do_sample") and not sampled:
            raise UserError(
                f"task '{name}' samples its text at a temperature, which is not supported under "
                "pipeline, sequence or expert parallelism and ZeRO-3; score the checkpoint "
                "afterwards"
            )

    def _check_room(self, what: str, longest: int) -> None:
        if longest >= self.max_length:
            raise UserError(
                f"{what} asks for {longest:,} tokens of text, which leaves no room for a prompt "
                f"within {self.max_length:,} tokens: give {self._length_option}N, above "
                f"{longest:,}"
            )

    def _prompt(
        self, ids: list[int], longest: int, stop: Sequence[str], kwargs: dict[str, Any], seed: int
    ) -> Prompt:
        def done(made: list[int]) -> bool:
            if made[-1] == self.text.eod_id:
                return True
            text = self._text_after(ids, made)
            return any(s in text for s in stop)

        sampled = kwargs.get("do_sample", False)
        return Prompt(
            ids,
            longest,
            done,
            temperature=float(kwargs.get("temperature", 1.0)) if sampled else 0.0,
            top_k=kwargs.get("top_k"),
            top_p=kwargs.get("top_p"),
            seed=seed,
        )

    def _text_after(self, prompt: list[int], ids: list[int]) -> str:
        before = prompt[-_BEFORE:]
        return self.text.decode([*before, *ids])[len(self.text.decode(before)) :]

    def _opened(self, ids: list[int]) -> list[int]:
        if (self.bos == "document" and ids[:1] != [self.prefix_token_id]) or not ids:
            return [self.prefix_token_id, *ids]
        return ids

    def _trimmed(self, ids: list[int], room: int) -> list[int]:
        if len(ids) <= room:
            return ids
        self.cut += 1
        if self.bos == "document":
            return [ids[0], *ids[len(ids) - room + 1 :]] if room > 1 else ids[:1]
        return ids[-room:]

    def _fitted(self, context: list[int], continuation: list[int]) -> Pair:
        """Return a request cut to ``max_length`` inputs.

        The context's beginning is cut first; a continuation that is too long by itself then loses
        its own.
        """
        context = self._opened(context)
        if len(continuation) > self.max_length:
            self.cut += 1
            return Pair(context[:1], continuation[-self.max_length :])
        return Pair(self._trimmed(context, self.max_length - len(continuation) + 1), continuation)
