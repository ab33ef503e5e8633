"""Texts generated piece by piece: by models of runs, and by those that transformers loads."""

from __future__ import annotations

import argparse
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import override

from evals.exit_options import add_options as add_exit_options
from evals.exit_options import exit_rule, given_exits
from evals.mitigations import add_options, apply_options, given_options
from evals.parallel_sampling import add_parallel_options, parallel_of
from pretrain.common.errors import UserError
from pretrain.inference.generate import LARGEST_SEED, generate
from pretrain.inference.hugging_face import HuggingFaceModel, HuggingFaceText, load_hugging_face
from pretrain.inference.load import LoadedModel, load_model
from pretrain.inference.speculate import Drafts, Speculation, speculate
from pretrain.inference.wavefront import Draw, WavefrontReport, check_loop, wavefront_ids
from pretrain.inference.wavefront_rules import Wavefront
from pretrain.parallel.processes import local_device

HF = "hf:"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Sampling:
    """How texts are drawn; see :func:`pretrain.inference.generate.choose`.

    ``parallel``: several tokens at once, by a model with recurrent depth.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    stop: Sequence[str] = ()
    seed: int = 0
    speculation: Speculation | None = None
    parallel: Wavefront | None = None


class Completion(ABC):
    """The text that follows a prompt, generated piece by piece.

    After the last piece ``reason`` says why it ended (``end of document``, ``stop string`` or
    ``length``), and ``tokens`` how many were generated. An incomplete character is held back, and
    so is what may be the beginning of a stop string; the stop string itself is never yielded.
    """

    def __init__(self, prompt_ids: list[int], sampling: Sampling) -> None:
        self.prompt_ids = prompt_ids
        self.reason, self.tokens = "", 0
        self._stop, self._most = [s for s in sampling.stop if s], sampling.max_tokens

    @abstractmethod
    def ids(self) -> Iterator[int]:
        """Yield the ids of the text, without that which ends it."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""

    def __iter__(self) -> Iterator[str]:
        start = self.decode(self.prompt_ids)
        made, shown = list[int](), 0
        for token in self.ids():
            made.append(token)
            self.tokens += 1
            # With the prompt: a token's text may depend on the tokens before it.
            text = self.decode([*self.prompt_ids, *made])[len(start) :]
            found = [at for at in (text.find(s) for s in self._stop) if at >= 0]
            if found:
                self.reason = "stop string"
                yield text[shown : min(found)]
                return
            safe = len(text.rstrip(_REPLACEMENT)) - self._beginning(text.rstrip(_REPLACEMENT))
            if safe > shown:
                yield text[shown:safe]
                shown = safe
        self.reason = "length" if self.tokens == self._most else "end of document"
        rest = self.decode([*self.prompt_ids, *made])[len(start) :][shown:]
        if rest:
            yield rest

    def _beginning(self, text: str) -> int:
        """Return the length of the longest end of ``text`` that begins a stop string."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest


class OwnCompletion(Completion):
    """That of a model of ours."""

    def __init__(self, loaded: LoadedModel, prompt_ids: list[int], sampling: Sampling) -> None:
        super().__init__(prompt_ids, sampling)
        self._loaded = loaded
        self.drafts = Drafts()
        self.report: WavefrontReport | None = None
        drawn: dict[str, Any] = {
            "vocab_size": loaded.candidates,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
        }
        ends: dict[str, Any] = {"max_tokens": sampling.max_tokens, "stop_ids": loaded.stop_ids}
        if sampling.speculation is not None:
            self._ids = speculate(
                loaded.model,
                prompt_ids,
                sampling.speculation,
                vocab_size=loaded.candidates,
                drafts=self.drafts,
                **ends,
            )
        elif sampling.parallel is not None:
            self.report = WavefrontReport()
            self._ids = wavefront_ids(
                loaded.model,
                prompt_ids,
                sampling.parallel,
                Draw(**drawn),
                **ends,
                report=self.report,
            )
        else:
            self._ids = generate(loaded.reader, prompt_ids, **drawn, **ends)

    @override
    def ids(self) -> Iterator[int]:
        return self._ids

    @override
    def decode(self, ids: list[int]) -> str:
        return self._loaded.decode(ids)


class HuggingFaceCompletion(Completion):
    """That of a model which transformers has loaded."""

    def __init__(self, model: HuggingFaceModel, prompt_ids: list[int], sampling: Sampling) -> None:
        super().__init__(prompt_ids, sampling)
        self._model, self._sampling = model, sampling

    @override
    def decode(self, ids: list[int]) -> str:
        return self._model.text.decode(ids)

    @override
    def ids(self) -> Iterator[int]:
        chosen, stop_ids = self._sampling, self._model.text.stop_ids
        options: dict[str, Any] = {"max_new_tokens": chosen.max_tokens}
        options |= {"do_sample": chosen.temperature > 0, "eos_token_id": sorted(stop_ids) or None}
        if chosen.temperature > 0:
            options |= {"temperature": chosen.temperature, "top_k": chosen.top_k or 0}
            options["top_p"] = chosen.top_p or 1.0
        stream = _Tokens()
        tokens = torch.tensor([self.prompt_ids], device=self._model.model.device)

        def run() -> None:
            try:
                torch.manual_seed(chosen.seed)
                self._model.model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    streamer=stream,
                    stopping_criteria=[lambda *_: stream.cancelled],
                    **options,
                )
                stream.finish(None)
            except Exception as error:  # shown by whoever reads
                stream.finish(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            for token in stream:
                if token in stop_ids:
                    return
                yield token
        finally:
            stream.cancelled = True
            thread.join()  # one inside torch while the interpreter ends would abort the process


class _Tokens:
    """The tokens that transformers' generate makes, handed from its thread to the reader's."""

    def __init__(self) -> None:
        self.cancelled = False
        self._found: list[int] = []
        self._ready = threading.Condition()
        self._prompt, self._finished = True, False
        self._error: Exception | None = None

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, and then token after token."""
        with self._ready:
            if not self._prompt:
                self._found += value.flatten().tolist()
            self._prompt = False
            self._ready.notify()

    def end(self) -> None:
        """Do nothing: whoever calls generate says when it has ended."""

    def finish(self, error: Exception | None) -> None:
        """Let the reader end, or raise ``error``."""
        with self._ready:
            self._finished, self._error = True, error
            self._ready.notify()

    def __iter__(self) -> Iterator[int]:
        position = 0
        while True:
            with self._ready:
                while position == len(self._found) and not self._finished:
                    self._ready.wait()
                if position == len(self._found):
                    if self._error is not None:
                        raise self._error
                    return
                token = self._found[position]
            position += 1
            yield token


@dataclass
class Writer:
    """A model that continues texts, ours or one of transformers."""

    model: LoadedModel | HuggingFaceModel

    @property
    def text(self) -> HuggingFaceText | None:
        """How an imported model, or one of transformers, reads and ends texts."""
        model = self.model
        return model.text if isinstance(model, HuggingFaceModel) else model.imported

    @property
    def training_length(self) -> int | None:
        """Return the tokens of the texts that it was trained on, where that is known."""
        return None if isinstance(self.model, HuggingFaceModel) else self.model.run.train.seq_len

    def depth(self) -> str:
        """Say how deep tokens have gone since this was asked last; nothing without exits."""
        exits = None if isinstance(self.model, HuggingFaceModel) else self.model.exits
        if exits is None or not exits.used:
            return ""
        used = exits.take_summary()
        share = used["flops_per_token"] / used["flops_per_token_of_all_passes"]
        return (
            f"{used['mean_passes']:.2f} of {exits.times} passes per token, "
            f"{used['flops_per_token'] / 1e6:,.2f} MFLOP ({share:.0%} of those of all passes)"
        )

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the ids of a text to continue, opened as the model knows texts."""
        model = self.model
        if isinstance(model, HuggingFaceModel):
            return model.text.prompt(prompt)
        return model.prompt_ids(prompt)

    def complete(self, prompt_ids: list[int], sampling: Sampling) -> Completion:
        """Return the text that follows."""
        if isinstance(self.model, HuggingFaceModel):
            return HuggingFaceCompletion(self.model, prompt_ids, sampling)
        return OwnCompletion(self.model, prompt_ids, sampling)


def add_sampling_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """Add the options of a model and of how its texts are drawn."""
    parser.add_argument(
        "checkpoint",
        help="a run directory, one of its checkpoints/step-N, or hf:NAME for a Hugging Face model "
        "by name or folder",
    )
    parser.add_argument("--max-tokens", type=int, default=max_tokens)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy (0.8)")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument(
        "--stop", action="append", default=[], help="text to end before; repeatable"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recurrences", type=int, help="passes of a recursive model's loop")
    parser.add_argument("--weights", choices=("last", "ema"), default="last")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="hf:NAME: run the Python code that comes with the model",
    )
    add_parallel_options(parser)
    add_exit_options(parser)
    add_options(parser)


def sampling_of(given: argparse.Namespace) -> Sampling:
    """Return how texts are drawn. Raises UserError for an option out of its range."""
    check_sampling(given.max_tokens, given.temperature, given.top_k, given.top_p, given.seed)
    for text in given.stop:
        check_utf8("--stop", text)
    return Sampling(
        given.max_tokens,
        given.temperature,
        given.top_k,
        given.top_p,
        given.stop,
        given.seed,
        parallel=parallel_of(given),
    )


def check_sampling(
    max_tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int
) -> None:
    """Raise UserError where a number is out of its range."""
    if max_tokens < 1:
        raise UserError(f"--max-tokens is {max_tokens}, expected 1 or more")
    if not (temperature == 0 or 1e-4 <= temperature < math.inf):
        raise UserError(f"--temperature is {temperature}, expected 0, or 1e-4 or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"--top-k is {top_k}, expected 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"--top-p is {top_p}, expected above 0 and at most 1")
    if not 0 <= seed < LARGEST_SEED:
        raise UserError(f"--seed is {seed}, expected 0 to 2^63 - 1")


def check_utf8(option: str, text: str) -> None:
    """Raise UserError where an option's text cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{option} is not UTF-8: {text!r}") from None


def open_writer(given: argparse.Namespace) -> Writer:
    """Load the model that the options name. Raises UserError where it cannot be."""
    if given.recurrences is not None and given.recurrences < 1:
        raise UserError(f"--recurrences is {given.recurrences}, expected 1 or more")
    wanted, exits = given_options(given), given_exits(given)
    if given.checkpoint.startswith(HF):
        named = {"recurrences": given.recurrences, **exits, **wanted}
        if given.weights != "last":
            named["weights"] = given.weights
        for option, value in named.items():
            if value is not None:
                raise UserError(
                    f"--{option.replace('_', '-')} is {value}, but this option is only for "
                    f"checkpoints of runs, not for {given.checkpoint}"
                )
        source = given.checkpoint.removeprefix(HF)
        trusted = given.trust_remote_code
        return Writer(load_hugging_face(source, device=local_device(), trust_remote_code=trusted))
    loaded = load_model(
        given.checkpoint,
        recurrences=given.recurrences,
        averaged=given.weights == "ema",
        exits=exit_rule(exits),
    )
    apply_options(loaded, wanted)
    if given.parallel:
        check_loop(loaded.model)
    return Writer(loaded)
