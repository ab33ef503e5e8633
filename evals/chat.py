"""``python -m evals chat MODEL``: talk to a model, or write a text with it, turn by turn.

A model that knows a form of conversations (a chat template, as imported models may) answers what
is typed. Any other continues the text that the turns make together; ``--prompt`` stays in front of
it. Lines that begin with a slash are commands.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from evals.completions import (
    Sampling,
    Writer,
    add_sampling_options,
    check_sampling,
    check_utf8,
    open_writer,
    sampling_of,
)
from pretrain.common.errors import UserError
from pretrain.parallel.processes import stop_processes

_HELP = """\
/reset          forget all turns; the prompt stays
/undo           forget the last turn
/again          another answer to the last turn, with the next seed
/history        show all turns
/set NAME VALUE temperature, top_k, top_p, max_tokens or seed; none: no top_k or top_p
/quit           end, as Ctrl-D does; Ctrl-C ends an answer"""
_NUMBERS = {"temperature": float, "top_k": int, "top_p": float, "max_tokens": int, "seed": int}


class Conversation:
    """The turns so far, as (what was typed, what was answered)."""

    def __init__(self, writer: Writer, prompt: str, *, plain: bool = False) -> None:
        self.writer, self.prompt = writer, prompt
        self.turns: list[tuple[str, str]] = []
        template = getattr(getattr(writer.text, "tokenizer", None), "chat_template", None)
        self.has_roles = template is not None and not plain

    def ids(self, typed: str) -> list[int]:
        """Return the ids of all turns and of what is typed now, to be continued."""
        text = self.writer.text
        if not self.has_roles or text is None:
            return self.writer.prompt_ids(self.text() + typed)
        messages = [{"role": "system", "content": self.prompt}] if self.prompt else []
        for question, answer in self.turns:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": typed})
        found = text.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return [int(token) for token in found]

    def text(self) -> str:
        """Return the prompt and all turns as one text."""
        return self.prompt + "".join(question + answer for question, answer in self.turns)


def main(arguments: Sequence[str]) -> int:
    """Read turns from the standard input, and print a model's answers as they are generated."""
    parser = argparse.ArgumentParser(
        prog="python -m evals chat",
        description="Talk to a model, or write a text with it, turn by turn.",
    )
    add_sampling_options(parser, max_tokens=200)
    parser.add_argument(
        "--prompt", default="", help="stays in front of all turns; the system's message in a chat"
    )
    parser.add_argument(
        "--plain", action="store_true", help="continue the text, whatever roles the model knows"
    )
    given = parser.parse_args(arguments)
    sampling = sampling_of(given)
    check_utf8("--prompt", given.prompt)
    conversation = Conversation(open_writer(given), given.prompt, plain=given.plain)
    how = "answers what you type" if conversation.has_roles else "continues the text that you type"
    print(f"the model {how}; /help lists commands, Ctrl-D ends", file=sys.stderr)
    if sys.stdin.isatty():
        importlib.import_module("readline")  # arrow keys, and the lines typed before
    while True:
        try:
            typed = input("> ")
        except EOFError:
            break
        except KeyboardInterrupt:
            print()
            continue
        if typed.strip() == "/quit":
            break
        try:
            sampling = _turn(conversation, typed, sampling)
        except UserError as error:
            print(error, file=sys.stderr)
    print()
    stop_processes()
    return 0


def _turn(conversation: Conversation, typed: str, sampling: Sampling) -> Sampling:
    """Answer a turn, or do as a command says; return how texts are drawn from then on."""
    command, *rest = typed.split() if typed.startswith("/") else [""]
    turns = conversation.turns
    if command == "/help":
        print(_HELP)
    elif command == "/reset":
        turns.clear()
    elif command == "/undo":
        _last(turns)
    elif command == "/history":
        for question, answer in turns:
            print(f"> {question}\n{answer}")
    elif command == "/set":
        return _changed(sampling, rest)
    elif command == "/again":
        question, _ = _last(turns)
        sampling = dataclasses.replace(sampling, seed=sampling.seed + 1)
        _answer(conversation, question, sampling)
    elif command:
        raise UserError(f"{command} is no command; /help lists them")
    else:
        check_utf8("what was typed", typed)
        _answer(conversation, typed, sampling)
    return sampling


def _last(turns: list[tuple[str, str]]) -> tuple[str, str]:
    if not turns:
        raise UserError("there is no turn yet")
    return turns.pop()


def _answer(conversation: Conversation, typed: str, sampling: Sampling) -> None:
    pieces = []
    completion = conversation.writer.complete(conversation.ids(typed), sampling)
    try:
        for piece in completion:
            print(piece, end="", flush=True)
            pieces.append(piece)
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    print()
    conversation.turns.append((typed, "".join(pieces)))


def _changed(sampling: Sampling, words: Sequence[str]) -> Sampling:
    """Return sampling with one number changed. Raises UserError for what is no such number."""
    known = ", ".join(_NUMBERS)
    if len(words) != 2 or words[0] not in _NUMBERS:
        raise UserError(f"/set {' '.join(words)}: expected a name of {known}, and a number")
    name, value = words
    if value == "none" and name in ("top_k", "top_p"):
        cleared: dict[str, Any] = {name: None}
        return dataclasses.replace(sampling, **cleared)
    try:
        number = _NUMBERS[name](value)
    except ValueError:
        raise UserError(f"/set {name} {value}: expected a number") from None
    changed = dataclasses.replace(sampling, **{name: number})
    check_sampling(
        changed.max_tokens, changed.temperature, changed.top_k, changed.top_p, changed.seed
    )
    return changed
