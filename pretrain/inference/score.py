"""Log-likelihoods of continuations and greedy or sampled text, many requests at a time.

Sequences are packed one after another, never padded, so no recurrent state sees what is not text;
the common prefixes of requests (a prompt's examples, a question before its answers) are computed
once and their states reused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.inference.exiting import ExitingModel
from pretrain.inference.generate import choose
from pretrain.inference.prefix_tree import Node, prefix_tree
from pretrain.model.counts import block_state_bytes
from pretrain.model.language_model import LanguageModel
from pretrain.model.spec import block_specs, passes, tokens_seen_ahead
from pretrain.nn.mixers.base import State
from pretrain.parallel.processes import gather, groups, replica_rank_and_size

T = TypeVar("T")
_STATE_BYTES = 2**31  # limit of the states of all sequences of a pass


@dataclass(frozen=True)
class Pair:
    """A ``context`` of at least one id, and the ``continuation`` that is scored after it."""

    context: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and how.

    ``done`` is called with the ids generated so far and returns whether to stop. Temperature 0
    takes the likeliest id.
    """

    ids: list[int]
    max_tokens: int
    done: Callable[[list[int]], bool]
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


class Scorer(ABC):
    """The interface of what scores and generates for evaluations.

    Attributes:
        candidates: Ids that a text can have.
        tokens_per_pass: Of one forward pass, about.
        device: Where tokens belong.
        alive: Called with every pass.
    """

    candidates: int
    tokens_per_pass: int
    device: torch.device
    alive: Callable[[], None] = staticmethod(lambda: None)

    @abstractmethod
    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Return each pair's log-likelihood in nats, and whether greedy decoding gives it."""

    @abstractmethod
    def generate(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return what follows each prompt; all processes give the same prompts, get all texts."""


class StateScorer(Scorer):
    """A scorer of a model that this process, with its tensor-parallel peers, has in full.

    Replicas split the requests, and all get all results.
    """

    def __init__(
        self,
        model: LanguageModel | ExitingModel,
        candidates: int,
        *,
        tokens_per_pass: int = 8192,
        share_prefixes: bool = True,
    ) -> None:
        self.model, self.candidates = model, candidates
        # Who sees a prompt's first tokens at once needs it in one pass.
        self._ahead = tokens_seen_ahead(model.model_config)
        if isinstance(model, ExitingModel):
            tokens_per_pass = min(tokens_per_pass, model.tokens_at_once)
        self.tokens_per_pass = tokens_per_pass
        self.share_prefixes = share_prefixes and not self._ahead
        self.device = next(model.parameters()).device
        specs = block_specs(model.model_config)
        self._sizes: dict[int, int] = {}
        self._specs = [(specs[i], count) for i, count in enumerate(passes(model.model_config))]

    @torch.no_grad()
    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Return each pair's log-likelihood in nats, and whether greedy decoding gives it.

        Of a model that sees a text's first tokens at once, no more than the context are those.
        """
        sequences = [[*pair.context, *pair.continuation[:-1]] for pair in pairs]
        was_training = self.model.training
        self.model.eval()
        local = self._local(sequences)
        wanted = _Wanted([pairs[i] for i in local])
        roots = prefix_tree([sequences[i] for i in local], share=self.share_prefixes)
        wanted.mark(roots)
        contexts = [len(pairs[i].context) for i in local] if self._ahead else None
        for nodes, x, ends, _ in self._passes(roots, contexts):
            wanted.score(nodes, x, ends, self.model, self.candidates)
        self.model.train(was_training)
        return merged(dict(zip(local, wanted.results(), strict=True)), len(pairs))

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return what follows each prompt; all processes give the same prompts, get all texts."""
        was_training = self.model.training
        self.model.eval()
        local = self._local([prompt.ids for prompt in prompts])
        found: dict[int, list[int]] = {}
        roots = prefix_tree([prompts[i].ids for i in local], share=self.share_prefixes)
        for nodes, x, ends, states in self._passes(roots):
            ends_here = [(row, local[i]) for row, node in enumerate(nodes) for i in node.ends]
            if ends_here:
                at = torch.tensor([row for row, _ in ends_here], device=self.device)
                logits = self.model.next_logits(x[ends.to(self.device)[at]])
                numbers = [number for _, number in ends_here]
                chosen = self.model.select_states(states, at)
                found.update(self._decode(numbers, prompts, logits, chosen))
        self.model.train(was_training)
        return merged(found, len(prompts))

    def _local(self, sequences: Sequence[list[int]]) -> list[int]:
        """Return this replica's requests: neighbours in order, about as many tokens for each."""
        rank, size = replica_rank_and_size()
        order = sorted(range(len(sequences)), key=lambda i: sequences[i])
        if size == 1:
            return order
        before = list(accumulate((len(sequences[i]) for i in order), initial=0))
        return [
            i
            for i, start in zip(order, before, strict=False)
            if start * size // max(before[-1], 1) == rank
        ]

    def _passes(
        self, roots: list[Node], prefixes: Sequence[int] | None = None
    ) -> Iterator[tuple[list[Node], Tensor, Tensor, list[State]]]:
        """Yield forward passes over the nodes, parents before children.

        Each is (nodes, their hidden rows one node after another, the row of each node's last token,
        their states). ``prefixes``: of each request, how many of its tokens may be seen ahead.
        """
        pending: list[tuple[list[Node], list[State] | None, list[int], list[int]]] = []
        if roots:  # a replica may have nothing to do
            pending.append((roots, None, [], [0] * len(roots)))
        while pending:
            nodes, states, parents, depths = pending.pop()
            count = self._how_many(nodes, depths)
            if count < len(nodes):
                pending.append((nodes[count:], states, parents[count:], depths[count:]))
            nodes = nodes[:count]
            before = None
            if states is not None:
                at = torch.tensor(parents[:count], device=self.device)
                before = self.model.select_states(states, at)
            packed = Sequences.from_lengths((len(n.tokens) for n in nodes), self.device)
            if prefixes is not None:  # then every request is a node of its own
                packed = packed.with_prefixes(
                    min(prefixes[n.ends[0]], len(n.tokens)) for n in nodes
                )
            tokens = torch.tensor([[t for n in nodes for t in n.tokens]], device=self.device)
            x, after = self.model.hidden_with_state(tokens, before, sequences=packed)
            self.alive()
            yield nodes, x, packed.on_host[1:] - 1, after
            children = [(c, row) for row, n in enumerate(nodes) for c in n.children]
            if children:
                below = [depths[row] + len(nodes[row].tokens) for _, row in children]
                rows = [row for _, row in children]
                pending.append(([c for c, _ in children], after, rows, below))

    def _how_many(self, nodes: list[Node], depths: list[int]) -> int:
        """Return how many of the first nodes, at these depths in tokens, go into one pass."""
        size = memory = 0
        for count, (node, depth) in enumerate(zip(nodes, depths, strict=True)):
            size += len(node.tokens)
            memory += self._state_bytes(depth + len(node.tokens))
            if count and (size > self.tokens_per_pass or memory > _STATE_BYTES):
                return count
        return len(nodes)

    def _state_bytes(self, length: int) -> int:
        """Return the bytes of one sequence's recurrent states, and keys and values of attention."""
        if length not in self._sizes:
            model = self.model
            halves = sum(
                count * block_state_bytes(model.model_config, spec, length)
                for spec, count in self._specs
            )
            scale = model.context.dtype.itemsize / 2 / model.context.tensor_size
            self._sizes[length] = int(halves * scale)
        return self._sizes[length]

    def _decode(
        self, numbers: list[int], prompts: Sequence[Prompt], logits: Tensor, states: list[State]
    ) -> dict[int, list[int]]:
        """Generate token by token, all texts side by side; those that are done leave."""
        made: dict[int, list[int]] = {number: [] for number in numbers}
        generators = {n: torch.Generator().manual_seed(prompts[n].seed) for n in numbers}
        running = list(numbers)
        while True:
            next_ids = _choose(
                logits[:, : self.candidates],
                [prompts[n] for n in running],
                [generators[n] for n in running],
            )
            stays = []
            for row, (number, token) in enumerate(zip(running, next_ids, strict=True)):
                prompt, ids = prompts[number], made[number]
                ids.append(token)
                if len(ids) < prompt.max_tokens and not prompt.done(ids):
                    stays.append(row)
            if not stays:
                return made
            if len(stays) < len(running):
                states = self.model.select_states(states, torch.tensor(stays, device=self.device))
            running = [running[row] for row in stays]
            tokens = torch.tensor([[next_ids[row]] for row in stays], device=self.device)
            self.alive()
            x, states = self.model.hidden_with_state(tokens, states)
            logits = self.model.next_logits(x)


class _Wanted:
    """The targets at rows of a tree's nodes that make up each pair's log-likelihood."""

    def __init__(self, pairs: list[Pair]) -> None:
        self._pairs = pairs
        # For every node, by identity: (offset, target) to the pairs that count it.
        self._at: dict[int, dict[tuple[int, int], list[int]]] = {}
        self._sums, self._hits = [0.0] * len(pairs), [True] * len(pairs)

    def mark(self, roots: list[Node]) -> None:
        """Note, for every node, the targets in it and the pairs that count each."""
        pending = [(root, 0) for root in roots]
        below = {id(n): _below(n) for root in roots for n in root.walk()}
        while pending:
            node, start = pending.pop()
            counted: dict[tuple[int, int], list[int]] = {}
            end = start + len(node.tokens)
            for number in below[id(node)]:
                pair = self._pairs[number]
                first = len(pair.context) - 1
                for at in range(max(first, start), end):
                    target = pair.continuation[at - first]
                    counted.setdefault((at - start, target), []).append(number)
            self._at[id(node)] = counted
            pending += [(child, end) for child in node.children]

    def score(
        self, nodes: list[Node], x: Tensor, ends: Tensor, model: Any, candidates: int
    ) -> None:
        """Add the scores of a pass's nodes to the pairs that count them."""
        rows, targets, counted = list[int](), list[int](), list[list[int]]()
        for node, end in zip(nodes, ends.tolist(), strict=True):
            start = end + 1 - len(node.tokens)
            for (offset, target), numbers in self._at[id(node)].items():
                rows.append(start + offset)
                targets.append(target)
                counted.append(numbers)
        if not rows:
            return
        wanted = torch.tensor(targets, device=x.device)
        scores = model.score(x[torch.tensor(rows, device=x.device)], wanted, candidates)
        values, likeliest = scores[0].tolist(), scores[1].tolist()
        for numbers, value, best, target in zip(counted, values, likeliest, targets, strict=True):
            for number in numbers:
                self._sums[number] += value
                self._hits[number] &= best == target

    def results(self) -> list[tuple[float, bool]]:
        """Return each pair's log-likelihood and whether it is greedy."""
        return list(zip(self._sums, self._hits, strict=True))


def _below(node: Node) -> list[int]:
    return [number for n in node.walk() for number in n.ends]


def _choose(
    logits: Tensor, prompts: Sequence[Prompt], generators: Sequence[torch.Generator]
) -> list[int]:
    """Return the next id of each text from logits ``[texts, candidates]``."""
    likeliest = logits.argmax(-1).tolist()
    return [
        best
        if prompt.temperature == 0
        else choose(row.float().cpu(), prompt.temperature, generator, prompt.top_k, prompt.top_p)
        for best, row, prompt, generator in zip(likeliest, logits, prompts, generators, strict=True)
    ]


def merged(found: dict[int, T], count: int) -> list[T]:
    """Return the results of all replicas of the weights, by number; every process must call."""
    everyone: dict[int, T] = {}
    state = groups()
    group = None if state is None else state.get_data_parallel_group(with_context_parallel=True)
    for some in gather(found, group):
        everyone.update(some)
    return [everyone[number] for number in range(count)]
