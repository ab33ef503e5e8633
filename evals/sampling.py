"""``python -m evals sample CHECKPOINT --prompt TEXT``: print a continuation as it is generated."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from evals.mitigations import add_options, apply_options, given_options
from pretrain.common.errors import UserError
from pretrain.inference.generate import LARGEST_SEED, generate
from pretrain.inference.load import LoadedModel, load_model
from pretrain.parallel.processes import stop_processes

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Completion:
    """The text that follows a prompt, generated piece by piece.

    After the last piece ``reason`` says why it ended (``end of document``, ``stop string`` or
    ``length``), and ``tokens`` how many were generated. An incomplete character is held back, and
    so is what may be the beginning of a stop string; the stop string itself is never yielded.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompt: str,
        *,
        max_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.prompt_ids = loaded.prompt_ids(prompt)
        self.reason, self.tokens = "", 0
        self._decode, self._stop, self._most = loaded.decode, [s for s in stop if s], max_tokens
        self._ids = generate(
            loaded.model,
            self.prompt_ids,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            vocab_size=loaded.candidates,
            stop_ids=loaded.stop_ids,
        )

    def __iter__(self) -> Iterator[str]:
        start = self._decode(self.prompt_ids)
        made, shown = list[int](), 0
        for token in self._ids:
            made.append(token)
            self.tokens += 1
            # With the prompt: a token's text may depend on the tokens before it.
            text = self._decode([*self.prompt_ids, *made])[len(start) :]
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
        rest = self._decode([*self.prompt_ids, *made])[len(start) :][shown:]
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


def main(arguments: Sequence[str]) -> int:
    """Print a checkpoint's continuation of a prompt."""
    parser = argparse.ArgumentParser(
        prog="python -m evals sample", description="Continue a text with a checkpoint."
    )
    parser.add_argument("checkpoint", help="a run directory, or one of its checkpoints/step-N")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", default="", help="text to continue (a new document)")
    text.add_argument("--prompt-file", type=Path, help="UTF-8 text; - reads the standard input")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy (0.8)")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument(
        "--stop", action="append", default=[], help="text to end before; repeatable"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recurrences", type=int, help="passes of a recursive model's loop")
    parser.add_argument("--weights", choices=("last", "ema"), default="last")
    add_options(parser)
    given = parser.parse_args(arguments)
    _check(given)
    prompt = given.prompt if given.prompt_file is None else _read(given.prompt_file)
    loaded = load_model(
        given.checkpoint, recurrences=given.recurrences, averaged=given.weights == "ema"
    )
    apply_options(loaded, given_options(given))
    completion = Completion(
        loaded,
        prompt,
        max_tokens=given.max_tokens,
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        stop=given.stop,
        seed=given.seed,
    )
    seen = loaded.run.train.seq_len
    if len(completion.prompt_ids) + given.max_tokens > seen:
        print(
            f"note: the prompt's {len(completion.prompt_ids):,} tokens and --max-tokens exceed the "
            f"training length of {seen:,}; nothing is cut",
            file=sys.stderr,
        )
    print(prompt, end="", flush=True)
    begun = time.perf_counter()
    for piece in completion:
        print(piece, end="", flush=True)
    seconds = time.perf_counter() - begun
    print()
    print(
        f"{completion.tokens} tokens after a prompt of {len(completion.prompt_ids)}, "
        f"{completion.tokens / seconds:,.1f} tokens/s, ended by {completion.reason}",
        file=sys.stderr,
    )
    stop_processes()
    return 0


def _check(given: argparse.Namespace) -> None:
    if given.max_tokens < 1:
        raise UserError(f"--max-tokens is {given.max_tokens}, expected 1 or more")
    if not (given.temperature == 0 or 1e-4 <= given.temperature < math.inf):
        raise UserError(f"--temperature is {given.temperature}, expected 0, or 1e-4 or more")
    for option, text in (("--prompt", given.prompt or ""), *(("--stop", s) for s in given.stop)):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{option} is not UTF-8: {text!r}") from None
    if given.top_k is not None and given.top_k < 1:
        raise UserError(f"--top-k is {given.top_k}, expected 1 or more")
    if given.top_p is not None and not 0 < given.top_p <= 1:
        raise UserError(f"--top-p is {given.top_p}, expected above 0 and at most 1")
    if not 0 <= given.seed < LARGEST_SEED:
        raise UserError(f"--seed is {given.seed}, expected 0 to 2^63 - 1")
    if given.recurrences is not None and given.recurrences < 1:
        raise UserError(f"--recurrences is {given.recurrences}, expected 1 or more")


def _read(path: Path) -> str:
    where = "the standard input" if str(path) == "-" else str(path)
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 at byte {error.start:,}; convert it first") from None
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from None
