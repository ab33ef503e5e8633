"""Recursion over depth: a group of blocks, weights tied, run several times.

Looped blocks (Relaxed Recursive Transformers, arXiv 2410.20672), recurrent depth (arXiv 2502.05171)
and the Universal Transformer (arXiv 1807.03819) with adaptive computation time (arXiv 1603.08983)
are settings of one loop; see :class:`pretrain.config.RecursionConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.common.errors import UserError
from pretrain.config import RecursionConfig
from pretrain.nn.global_batch import Piece, sequences_of
from pretrain.nn.linear import plain_linear
from pretrain.nn.maximal_update import Role
from pretrain.nn.parameters import (
    Initializer,
    constant,
    normal,
    replicated_parameter,
    used_on_local_tokens,
)
from pretrain.parallel.collectives import gather_sequence
from pretrain.parallel.context import ParallelContext

_EVALUATION = 2**32 - 1  # stands for "no step" among the seeds
_RECURRENCES, _STATE, _OFFSET = 0, 1, 2  # the streams of random numbers


def sample_recurrences(mean: int, seed: int, step: int) -> int:
    """Draw the passes of a training step: 1 + Poisson of a log-normal rate with mean ``mean``.

    See arXiv 2502.05171, section 3.3. The number is the same for all micro-batches of the step on
    every process, which must stay in step and give the same numbers however many they are.
    """
    generator = np.random.default_rng([seed, step, _RECURRENCES])
    rate = generator.lognormal(np.log(mean) - 0.125, 0.5)
    return int(generator.poisson(rate)) + 1


class Recursion(nn.Module):
    """The parameters of a loop besides those of its blocks, and the passes through them."""

    def __init__(
        self,
        config: RecursionConfig,
        hidden_size: int,
        std: float,
        context: ParallelContext,
        seq_len: int | None = None,
    ):
        """Make the loop; ``seq_len`` as for :class:`.LanguageModel`."""
        super().__init__()
        self.config, self.seq_len, self._context = config, seq_len, context
        self._width = hidden_size
        self.times: int | None = None  # instead of the configured number, in evaluation
        self.in_step = False  # all processes must make the same passes
        self._seed, self._step, self._micro_batch = 0, 0, 0
        self._rank, self._world_size = 0, 1
        self._passes: list[int] = []
        self._ponder: list[Tensor] = []
        self._exits: list[Tensor] = []
        d = hidden_size
        if config.adapter:
            self.adapter = self._replicated((d, 2 * d), normal(std), role="hidden")
        if config.step_signal == "learned":
            self.step_signal = self._replicated((config.times, d), normal(std))
        if config.halting:
            self.halting_weight = self._replicated((1, d), normal(std), role="output")
            self.halting_bias = self._replicated((1,), constant(1.0))

    def _replicated(
        self, shape: tuple[int, ...], init: Initializer, role: Role = "input"
    ) -> nn.Parameter:
        parameter = replicated_parameter(self._context, shape, init, role=role)
        return used_on_local_tokens(parameter, self._context)

    def begin_step(self, seed: int, step: int, rank: int = 0, world_size: int = 1) -> None:
        """Set what numbers are drawn from; see :meth:`.LanguageModel.begin_step`."""
        self._seed, self._step, self._micro_batch = seed, step, 0
        self._rank, self._world_size = rank, world_size

    def metrics(self) -> dict[str, float]:
        """Return and reset the mean number of passes and, per token, of what the loss has besides.

        That is the ponder cost, with halting, and the losses of earlier passes. Means are over the
        training micro-batches since the last call.
        """
        passes, self._passes = self._passes, []
        ponder, self._ponder = self._ponder, []
        found = {"recurrences": sum(passes) / len(passes)} if passes else {}
        if ponder:
            found["ponder_cost"] = float(torch.stack(ponder).mean())
        exits, self._exits = self._exits, []
        if exits:
            found["exit_loss"] = float(torch.stack(exits).mean())
        return found

    def set_times(self, times: int | None) -> None:
        """Set the number of passes in evaluation; None for the configured one.

        Raises UserError where the loop has parameters for each pass, and fewer of them.
        """
        config = self.config
        if times is not None and times < 1:
            raise UserError(f"recurrences is {times}, expected at least 1")
        learned = config.lora_rank > 0 or config.step_signal == "learned"
        if times is not None and learned and times > config.times:
            raise UserError(
                f"recurrences is {times}, but this model learned {config.times} different passes "
                "(lora_rank or step_signal): expected at most as many"
            )
        self.times = times

    def num_passes(self) -> int:
        """Return the passes of the forward call that begins; counts micro-batches in training."""
        config = self.config
        if not self.training:
            return self.times or config.times
        times = config.times
        if config.sampling == "poisson":
            times = sample_recurrences(times, self._seed, self._step)
        self._micro_batch += 1
        self._passes.append(times)
        return times

    @property
    def learns_exits(self) -> bool:
        """Return whether the loss has a part of the earlier passes."""
        return self.training and self.config.exit_weight > 0

    def forward(
        self,
        x: Tensor,
        run: Callable[[Tensor, int], Tensor],
        *,
        all_passes: bool,
        positions: Tensor | None = None,
        earlier: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the loop on x ``[T, B, d]``, the prelude's output.

        ``run(state, pass)`` goes through the blocks once. ``all_passes``: make every pass even
        where all tokens have halted, because the blocks' states are needed. So does training, where
        every process must use every parameter, sequence parallelism, where none sees all tokens,
        and ``in_step``. ``positions`` of the tokens ``[T, B]`` must be there where the signal is of
        coordinates. ``earlier`` takes the state after every pass but the last. Returns the last
        state and, with halting, each token's ponder cost ``[T, B]``.
        """
        config, times = self.config, self.num_passes()
        through = times
        if self.training and config.backprop_last is not None:
            through = min(times, config.backprop_last)
        state = self.initial(x)
        halting = _Halting(config, x) if config.halting else None
        if positions is not None:
            if self.training and config.position_offsets:
                positions = positions + self._offsets(x)
            positions = self.coordinates(positions)
        all_passes = all_passes or self.training or self.in_step
        all_passes = all_passes or self._context.sequence_parallel
        for index in range(times):
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= times - through):
                stays = self.pass_input(state, x, index, positions)
                new = run(stays, index)
            if halting is not None:
                if config.halting_state == "copy":
                    new = torch.where(halting.running[..., None], new, state)
                wide = halting.cost.dtype
                logit = nn.functional.linear(
                    stays.to(wide), self.halting_weight.to(wide), self.halting_bias.to(wide)
                )
                halting.add(torch.sigmoid(logit)[..., 0], new, last=index == times - 1)
                if not all_passes and halting.all_done():
                    break
            if earlier is not None and index < times - 1:
                earlier.append(new)
            state = new
        if halting is None:
            return state, None
        if self.training:
            self._ponder.append(halting.cost.detach().mean())
        return halting.output, halting.cost

    def with_cost(self, losses: Tensor, ponder: Tensor) -> Tensor:
        """Return losses ``[B, T]`` with the gradient of the tokens' ponder cost ``[T, B]`` as well.

        In the gradient, not in the value: the loss stays a cross entropy.
        """
        if self._context.sequence_parallel:
            ponder = gather_sequence(ponder, self._context.group, reduce_gradient=False)
        cost = self.config.ponder_weight * ponder.t()
        return losses + (cost - cost.detach())

    def with_exits(self, losses: Tensor, exits: Tensor) -> Tensor:
        """Return losses ``[B, T]`` with the gradient of ``exits`` ``[B, T]``, summed over passes.

        In the gradient, not in the value: the loss stays that of the last pass.
        """
        self._exits.append(exits.detach().mean())
        cost = self.config.exit_weight * exits
        return losses + (cost - cost.detach())

    def pass_input(
        self, state: Tensor, x: Tensor, index: int | Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """Return what goes through the blocks at pass ``index`` of the loop on x ``[T, B, d]``.

        ``index`` may also be int64 ``[T, B]``: every token's own pass, the last one beyond those
        that were learned. ``positions`` are the tokens' :meth:`coordinates`, where they are added.
        """
        stays = state
        if self.config.adapter:
            stays = plain_linear(torch.cat([state, x], -1), self.adapter)
        if self.config.step_signal != "none":
            stays = stays + self._signal(index, stays)
        return stays if positions is None else stays + positions.to(stays)

    def coordinates(self, positions: Tensor) -> Tensor:
        """Return the sinusoids ``[T, B, d]`` of positions ``[T, B]``, counted from 1 in them."""
        return _sinusoid(positions + 1, self._width, positions.device)

    def initial(self, x: Tensor) -> Tensor:
        """Return the state that the first pass on x ``[T, B, d]`` starts from."""
        config = self.config
        if config.state_init == "input":
            return x
        if config.state_init == "zeros":
            return torch.zeros_like(x)
        noise = self._noise(x) if self.training else self._noise_of_evaluation(x)
        return (noise.clamp_(-3, 3) * config.state_std).to(x).expand_as(x)

    def _noise(self, x: Tensor) -> Tensor:
        """Draw normal numbers for each sequence of the global batch, float32 in x's shape."""
        tokens, rows, d = x.shape
        noise = torch.empty(rows, tokens, d, device=x.device)
        if not x.is_meta:
            for piece in self._pieces(x):
                generator = _generator((self._seed, self._step, piece.number), x.device)
                drawn = torch.randn(piece.length, d, generator=generator, device=x.device)
                noise[piece.row, piece.places] = drawn[piece.tokens]
        return noise.transpose(0, 1).contiguous()

    def _offsets(self, x: Tensor) -> Tensor:
        """Draw where the positions of each sequence of the global batch begin, ``[T, B]``."""
        offsets = torch.zeros(x.shape[:2], device=x.device, dtype=torch.int64)
        if not x.is_meta:
            for piece in self._pieces(x):
                generator = np.random.default_rng([self._seed, self._step, piece.number, _OFFSET])
                begins = generator.integers(self.config.position_offsets + 1)
                offsets[piece.places, piece.row] = int(begins)
        return offsets

    def _pieces(self, x: Tensor) -> Iterator[Piece]:
        # num_passes has counted this micro-batch already.
        micro_batch = (self._micro_batch - 1) * self._world_size + self._rank
        return sequences_of(x, micro_batch, self.seq_len, self._context)

    def _noise_of_evaluation(self, x: Tensor) -> Tensor:
        """Draw one state for all tokens: no token's score depends on where it lies in a batch."""
        device = torch.device("cpu") if x.is_meta else x.device
        generator = _generator((0, _EVALUATION, 0), device)
        return torch.randn(x.shape[-1], generator=generator, device=device)

    def _signal(self, index: int | Tensor, x: Tensor) -> Tensor:
        if self.config.step_signal == "learned":
            if isinstance(index, Tensor):
                index = index.clamp_max(len(self.step_signal) - 1)
            return self.step_signal[index]
        return _sinusoid(index + 1, x.shape[-1], x.device).to(x.dtype)


def _sinusoid(numbers: int | Tensor, d: int, device: torch.device) -> Tensor:
    """Return sines and cosines in turn, ``[..., d]`` in float64, of numbers ``[...]``."""
    exponents = torch.arange(0, d, 2, device=device, dtype=torch.float64) / d
    angles = (numbers[..., None] if isinstance(numbers, Tensor) else numbers) * 10_000.0**-exponents
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)[..., :d]


def _generator(seeds: tuple[int, int, int], device: torch.device) -> torch.Generator:
    seed = int(np.random.default_rng([*seeds, _STATE]).integers(2**62))
    return torch.Generator(device).manual_seed(seed)


class _Halting:
    """Adaptive computation time, separately for every token.

    A token halts at the first pass where the sum of its probabilities exceeds the threshold; that
    pass is weighted by what remains to 1. The output is the weighted mean of states, the cost
    passes plus remainder.
    """

    def __init__(self, config: RecursionConfig, x: Tensor):
        self._threshold = config.halting_threshold
        self.output = torch.zeros_like(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        self.cost = torch.zeros(x.shape[:-1], device=x.device, dtype=dtype)
        self._total = torch.zeros_like(self.cost)
        self.running = torch.ones_like(self.cost, dtype=torch.bool)

    def add(self, probability: Tensor, state: Tensor, *, last: bool) -> None:
        stops = self.running & (self._total + probability > self._threshold)
        if last:
            stops = self.running
        remainder = 1 - self._total
        weight = torch.where(stops, remainder, probability) * self.running
        self.cost = self.cost + self.running + torch.where(stops, remainder, 0)
        self.output = self.output + (weight[..., None] * state).to(state.dtype)
        self._total = self._total + weight
        self.running = self.running & ~stops

    def all_done(self) -> bool:
        return not bool(self.running.any())
