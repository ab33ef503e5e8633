"""The wavefront sampler of recurrent depth (diffusion forcing, arXiv 2510.14961).

A guess of the next token is started before the loop has settled on the one before it. All
unfinished positions, the window, are refined together, and their tokens decoded anew in every step;
those that have settled become final. The loop's keys, values and states are shared by its passes:
every pass sees those of the last pass of earlier positions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from pretrain.common.errors import UserError
from pretrain.data.sequences import Sequences
from pretrain.inference.generate import choose
from pretrain.inference.wavefront_rules import Row, Wavefront, advance
from pretrain.inference.wavefront_window import Window, of_row, sections
from pretrain.model.block import Block
from pretrain.model.language_model import LanguageModel
from pretrain.model.recursion import Recursion
from pretrain.nn.mixers.sliced_attention import SlicedAttention

_LONGEST = 64  # the published rule's steps, as a multiple of those of plain generation


@dataclass(frozen=True)
class Draw:
    """How the next token is chosen; see :func:`.choose`. Row number n draws from ``seed`` + n."""

    vocab_size: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


@dataclass
class WavefrontReport:
    """What generating has taken.

    Attributes:
        steps: Steps, in each of which the window's tokens were decoded.
        core_calls: Calls of the looped blocks, whatever the number of positions.
        core_positions: The positions in all of them.
        prompt_calls: Those calls for the prompts, which are not among them.
        depths: For each row, the passes by which each of its tokens was made.
    """

    steps: int = 0
    core_calls: int = 0
    core_positions: int = 0
    prompt_calls: int = 0
    depths: list[list[int]] = field(default_factory=list)

    def describe(self) -> str:
        """Return the figures in a line."""
        passes = [depth for row in self.depths for depth in row]
        count, calls = max(len(passes), 1), self.core_calls + self.prompt_calls
        return (
            f"{sum(passes) / count:.2f} passes and {calls / count:.2f} calls of the loop per "
            f"token, {self.core_positions / max(self.core_calls, 1):.1f} positions per call, "
            f"{self.steps} steps"
        )


def check_loop(model: LanguageModel) -> Recursion:
    """Return the model's loop. Raises UserError where its tokens cannot be refined in parallel."""
    loop = model.recursion
    if loop is None:
        raise UserError(
            "sampling in parallel refines tokens by a loop over depth, but this model has none "
            "(model.recursion is null)"
        )
    config = loop.config
    if config.halting:
        raise UserError(
            "sampling in parallel decodes a loop's last state, but with model.recursion.halting "
            "the output is a mean of states; expected halting=false"
        )
    if not config.adapter:
        raise UserError(
            "sampling in parallel changes a token while the loop runs, which only a loop with "
            "model.recursion.adapter sees; expected adapter=true"
        )
    if config.lora_rank:
        raise UserError(
            f"sampling in parallel runs several passes in one call, but with "
            f"model.recursion.lora_rank {config.lora_rank} each has matrices of its own; "
            "expected lora_rank=0"
        )
    for index in sections(model)[1]:
        block = cast(Block, model.blocks[index])
        if isinstance(block.mixer, SlicedAttention):
            raise UserError(
                f"sampling in parallel runs several passes in one call, but {block.kind} attends "
                "differently in each; expected another mixer in the loop"
            )
    return loop


class WavefrontSampler:
    """Several texts that grow in parallel, step by step; none depends on the others."""

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        config: Wavefront,
        draw: Draw,
        *,
        max_tokens: int,
        stop_ids: Collection[int] = (),
    ):
        """Read the prompts, none of them empty, and choose the first token after each.

        The model must be in evaluation mode and whole; ``stop_ids`` end a text and are not in it.
        Raises UserError for settings out of their range, and for a model that cannot be used.
        """
        config.check()
        self._model, self._loop = model, check_loop(model)
        self._config, self._draw = config, draw
        self._max_tokens, self._stop_ids = max_tokens, frozenset(stop_ids)
        self._sections = sections(model)
        self._device = next(model.parameters()).device
        self.report = WavefrontReport()
        self.limit = self._loop.num_passes()
        self._drawn = [
            torch.Generator().manual_seed(_seed(draw.seed + n)) for n in range(len(prompts))
        ]
        self.rows: list[Row] = []
        self.open: list[int] = []
        if max_tokens > 0:
            self._read(prompts)
        self.report.depths = [row.depths for row in self.rows]

    @torch.no_grad()
    def step(self) -> None:
        """Make ``inner`` passes for all unfinished positions, and let the settled ones go."""
        groups: dict[int, list[int]] = {}
        for number in self.open:
            row = self.rows[number]
            row.open_new()
            inner = self._config.inner
            if not self._config.published:  # which has no limit
                inner = min(inner, self.limit - row.since[0])
            groups.setdefault(inner, []).append(number)
        for inner, numbers in groups.items():
            self._step(numbers, inner)
        self.report.steps += 1
        self.open = [number for number in self.open if not self._ended(number)]

    def texts(self) -> list[list[int]]:
        """Return the ids after each prompt, once all have ended."""
        while self.open:
            self.step()
        return [row.text for row in self.rows]

    @torch.no_grad()
    def _read(self, prompts: Sequence[Sequence[int]]) -> None:
        lengths = [len(prompt) for prompt in prompts]
        tokens = torch.tensor([[token for prompt in prompts for token in prompt]])
        sequences = Sequences.from_lengths(lengths, self._device)
        hidden, states = self._model.hidden_with_state(
            tokens.to(self._device), None, sequences=sequences
        )
        self.report.prompt_calls = self.limit
        prelude, core, _ = self._sections
        skipped = (self.limit - 1) * len(core)
        # Of the loop, the last pass's for all.
        states = states[: len(prelude)] + states[len(prelude) + skipped :]
        ends = torch.tensor(lengths, device=self._device).cumsum(0) - 1
        logits = self._model.next_logits(hidden[ends])
        for number, length in enumerate(lengths):
            noise = torch.Generator().manual_seed(_seed(self._draw.seed + number, 1))
            empty = hidden.new_zeros(0, hidden.shape[-1])
            cache = of_row(self._model, states, number)
            row = Row(cache, length, [], empty, noise)
            self.rows.append(row)
            token = self._chosen(number, length, logits[number])
            row.tokens = [token]
            if self._config.published:
                row.passes = [self.limit]
            self._emit(row, [token], [self.limit])
            if not self._ended(number):
                self.open.append(number)

    def _step(self, numbers: list[int], inner: int) -> None:
        config, rows = self._config, [self.rows[number] for number in numbers]
        prelude, core, coda = self._sections
        lengths = [len(row.tokens) for row in rows]
        window = Window(self._model, [row.tokens for row in rows], [r.cache for r in rows])
        embedded = window.run(window.embedded, prelude)
        pieces = embedded[:, 0].split(lengths)
        mixed = [row.smoothed(e, config) for row, e in zip(rows, pieces, strict=True)]
        embedded = torch.cat(mixed)[:, None]
        fresh = self._loop.initial(embedded)[:, 0].split(lengths)
        before = [
            torch.cat([row.states, new[len(row.states) :]])
            for row, new in zip(rows, fresh, strict=True)
        ]
        std = self._loop.config.state_std
        noisy = [row.noisy(s, std, config) for row, s in zip(rows, before, strict=True)]
        states = torch.cat(noisy)[:, None]
        passes = torch.tensor([n for row in rows for n in row.passes], device=self._device)
        positions = None
        if self._loop.config.step_signal == "coordinate":
            where = [row.start + i for row in rows for i in range(len(row.tokens))]
            positions = self._loop.coordinates(torch.tensor(where, device=self._device)[:, None])
        entering = states
        for index in range(inner):
            entering = self._loop.pass_input(states, embedded, (passes + index)[:, None], positions)
            states = window.run(entering, core)
        self.report.core_calls += inner
        self.report.core_positions += inner * sum(lengths)
        hidden = self._model.final_norm(states) if self._loop.config.normalize_state else states
        logits = self._model.next_logits(window.run(hidden, coda)[:, 0]).split(lengths)
        moved: list[int] = []
        for number, row, old, new, scores in zip(
            numbers, rows, before, states[:, 0].split(lengths), logits, strict=True
        ):
            row.count(inner)
            first = row.start + 1
            made = [self._chosen(number, first + i, score) for i, score in enumerate(scores)]
            count = row.leaving(old, new, made, self.limit, config)
            moved.append(count)
            row.states = new
            self._emit(row, made[:count], row.passes[:count])
            advance(row, count, made, config, partial(self._guess, number, made))
            self._check_progress(row)
        caches, again = window.behind(moved, entering, hidden)
        self.report.core_calls += again > 0
        self.report.core_positions += again
        for row, cache in zip(rows, caches, strict=True):
            row.cache = cache

    def _chosen(self, number: int, position: int, logits: Tensor) -> int:
        draw = self._draw
        generator = self._drawn[number]
        if draw.temperature > 0 and not self._config.published:
            # A position's own: it draws alike in every step, or its token would never settle.
            generator = torch.Generator().manual_seed(_seed(draw.seed + number, 2, position))
        scores = logits[: draw.vocab_size].float().cpu()
        return choose(scores, draw.temperature, generator, draw.top_k, draw.top_p)

    def _guess(self, number: int, made: list[int]) -> int:
        if not self._config.published:
            return made[-1]
        generator = self._drawn[number]
        return int(torch.randint(self._draw.vocab_size, (), generator=generator))

    def _emit(self, row: Row, tokens: list[int], depths: list[int]) -> None:
        for token, depth in zip(tokens, depths, strict=True):
            if len(row.text) == self._max_tokens or row.stopped:
                return
            if token in self._stop_ids:
                row.stopped = True
                return
            row.text.append(token)
            row.depths.append(depth)

    def _ended(self, number: int) -> bool:
        row = self.rows[number]
        return row.stopped or len(row.text) == self._max_tokens

    def _check_progress(self, row: Row) -> None:
        most = _LONGEST * self._max_tokens * (self.limit // self._config.inner + 1)
        if row.steps > most:
            raise UserError(
                f"sampling in parallel by the published rule has made {len(row.text)} tokens in "
                f"{row.steps:,} steps, as nothing limits its passes; expected a larger eps than "
                f"{self._config.eps}"
            )


def wavefront_ids(
    model: LanguageModel,
    prompt: Sequence[int],
    config: Wavefront,
    draw: Draw,
    *,
    max_tokens: int,
    stop_ids: Collection[int] = (),
    report: WavefrontReport | None = None,
) -> Iterator[int]:
    """Yield up to ``max_tokens`` ids after ``prompt`` as they become final.

    The counterpart of :func:`.generate`; ``report`` takes the figures. Raises UserError as
    :class:`WavefrontSampler` does.
    """
    was_training = model.training
    model.eval()
    try:
        sampler = WavefrontSampler(
            model, [prompt], config, draw, max_tokens=max_tokens, stop_ids=stop_ids
        )
        shown = 0
        while True:
            if report is not None:
                vars(report).update(vars(sampler.report))
            for row in sampler.rows:
                yield from row.text[shown:]
                shown = len(row.text)
            if not sampler.open:
                return
            sampler.step()
    finally:
        model.train(was_training)


def _seed(*numbers: int) -> int:
    return int(np.random.default_rng(numbers).integers(2**62))
