"""Memory of one process under a layout: what every step holds, and activations at their worst."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import add

import torch

from pretrain.common.dtypes import DTYPES
from pretrain.config import ParallelConfig, RunConfig
from pretrain.config.optimizer import WHOLE_MATRICES
from pretrain.model.carried import homes_and_ends
from pretrain.model.counts import block_state_bytes
from pretrain.model.layout import ENDLESS
from pretrain.model.spec import block_specs, passes
from pretrain.optim import adamw
from pretrain.optim.optimizer import GATHERED_AT_ONCE, rule
from pretrain.planner.hardware import Hardware
from pretrain.planner.kinds import ParameterKind, count_kinds, learning
from pretrain.planner.software import Software
from pretrain.planner.units import Unit

_DEEPSPEED_BUCKET = 200_000_000  # elements
LIVE_PARAMETERS = 1_000_000_000  # that DeepSpeed's ZeRO-3 keeps gathered


@dataclass(frozen=True)
class Memory:
    """The memory of one run's processes on one kind of hardware."""

    config: RunConfig
    vocab_size: int
    hardware: Hardware
    software: Software

    def held(
        self,
        parallel: ParallelConfig,
        tensors: Sequence[tuple[ParameterKind, int]],
        experts: Sequence[tuple[ParameterKind, int]],
        data: int,
    ) -> dict[str, float]:
        """Return the bytes of weights, gradients, optimizer state and of an update in progress.

        ``tensors`` and ``experts`` are the process's parameters, each with its kind and size.
        """
        memory = self._state(parallel, tensors, data)
        if experts:  # copies of an expert are fewer, so less of its optimizer is sharded
            copies = data * parallel.tensor // parallel.expert
            for kind, more in self._state(parallel, experts, copies).items():
                memory[kind] = (max if kind == "update" else add)(memory[kind], more)
        return memory

    def _state(
        self, parallel: ParallelConfig, tensors: Sequence[tuple[ParameterKind, int]], data: int
    ) -> dict[str, float]:
        """Return the bytes of weights, gradients, optimizer state and of an update in progress."""
        held = count_kinds(tensors)
        low_precision = self.config.train.precision != "float32"
        total, learned = sum(held.values()), learning(tensors)
        weights = float(sum(n * kind[0].itemsize for kind, n in held.items()))
        shards = data if parallel.zero_stage else 1
        stepped = Counter[bool]()
        for (_, decay, name), n in held.items():
            stepped[decay] += n * (name == "adamw")
        # torch's passes over a group: a root of every element, unless one kernel does them all.
        # Other rules go through their parameters one by one.
        passes = adamw.implementation(self.hardware.device) != "fused"
        update = passes * 4.0 * max(stepped.values()) / shards
        if self.software.state_bytes is not None:
            share = self.software.state_bytes * total / shards
            whole = self.software.whole_gradients * total
            return {"weights": share, "gradients": whole, "optimizer": 0.0, "update": 0.0}
        if parallel.zero_backend == "megatron":
            states = [(n, n * self._state_bytes(kind)) for kind, n in tensors if kind[2]]
            layer_wise = self.layer_wise(parallel) and shards > 1
            if layer_wise:
                # What others have updated comes in pieces.
                update = max(update, min(weights, float(GATHERED_AT_ONCE)))
            return {
                "weights": weights,
                "gradients": 4.0 * learned,
                "optimizer": _largest_share(states, shards)
                if layer_wise
                else sum(size for _, size in states) / shards,
                "update": update,
            }
        width = 2 if low_precision else 4
        bucket = 4.0 * min(_DEEPSPEED_BUCKET, learned)
        moments = (8.0 if parallel.zero_stage == 0 else 12.0) * learned / shards
        if parallel.offload == "nvme" or (
            parallel.offload == "cpu" and self.hardware.device != "cpu"
        ):
            moments = 0.0  # not in this device's memory
        memory = {
            "weights": float(width * total),
            "gradients": float(width * learned),
            "optimizer": moments,
            "update": update,
        }
        if parallel.zero_stage >= 2:
            memory["gradients"] = 4.0 * learned / data
            # A CPU's memory counts when it is written to: see ``activations``.
            memory["communication"] = 0.0 if self._fills_late(parallel) else bucket
        if parallel.zero_stage == 3:
            memory["weights"] = width * total / data
            memory["communication"] += width * min(LIVE_PARAMETERS, total)  # gathered
        return memory

    def _state_bytes(self, kind: ParameterKind) -> float:
        """Return what is kept of an element: moments, average, float32 copy."""
        dtype, _, name = kind
        assert name is not None
        copies = len(rule(name).STATE_KEYS) + (self.config.optimizer.ema_decay > 0)
        return 4.0 * (copies + (dtype != torch.float32))

    def layer_wise(self, parallel: ParallelConfig) -> bool:
        """Return whether ZeRO deals out whole parameters."""
        return parallel.zero_stage == 1 and self.config.optimizer.kind in WHOLE_MATRICES

    def activations(
        self,
        parallel: ParallelConfig,
        chains: list[list[tuple[Unit, bool]]],
        rank: int,
        micro_batches: int,
        state: dict[str, float],
    ) -> dict[str, float]:
        """Return the bytes of activations at the worst moment of a step, head and loss apart.

        An update comes when there are none, so only the larger of both counts.
        """
        worst, head, kept = 0.0, 0.0, 0.0
        stages, parts = parallel.pipeline, parallel.virtual_pipeline
        late = 4.0 * self._fills_late(parallel)
        for chain in chains:
            held = 0.0
            for unit, trained in chain:
                worst = max(worst, held + unit.forward.peak)
                held += unit.forward.kept * trained
            kept += held
            filled = late * self.vocab_size * self.config.model.hidden_size / parallel.tensor
            for unit, trained in reversed(chain):
                if trained:
                    held -= unit.forward.kept
                    if unit.name == "head":
                        head = max(unit.forward.peak, unit.backward.peak)
                    worst = max(worst, held + unit.backward.peak + filled)
                    filled += late * learning(unit.tensors)
        if self.software.logits_bytes and any(
            u.name == "head" for chain in chains for u, _ in chain
        ):
            rows = self.config.train.seq_len * parallel.micro_batch_size
            head = self.software.logits_bytes * rows * self.vocab_size
            worst = max(worst, kept + head)
        if parts > 1:
            ahead = 2 * (stages - rank - 1) + (parts - 1) * stages + 1
            waiting = (min(ahead, micro_batches * parts) - 1) / parts
        else:
            waiting = min(stages - rank, micro_batches) - 1
        total = worst + waiting * kept + self.borders(parallel)
        head = min(head, total)
        update = state["update"]
        carried = self.carried(parallel, micro_batches * parallel.micro_batch_size)
        found = {"carried states": carried} if carried else {}
        if total <= update:
            return {"activations": 0.0, "logits and loss": 0.0, **found}
        return {"activations": total - head, "logits and loss": head, "update": 0.0, **found}

    def borders(self, parallel: ParallelConfig) -> float:
        """Return the bytes of states between segments, where rows come in segments.

        What grows with a sequence (keys and values of full attention) is kept once for a row; in
        the backward pass a sequence's is also in its layer, and there are two gradients of it.
        """
        train, size = self.config.train, self.config.train.segment_tokens
        if size is None:
            return 0.0
        length, width = train.seq_len, DTYPES[train.precision].itemsize
        row = length * parallel.micro_batch_size
        borders = [cut % length for cut in range(size, row, size) if cut % length]
        total = 0.0
        for spec in block_specs(self.config.model):
            count = partial(block_state_bytes, self.config.model, spec)
            if count(2 * ENDLESS) > count(ENDLESS):
                total += width / 2 * (count(length) * (parallel.micro_batch_size + 3))
            else:
                total += sum(map(count, borders))
        return total / parallel.tensor

    def carried(self, parallel: ParallelConfig, rows: int) -> float:
        """Return the bytes of states that a process's rows carry from step to step, if they do.

        With context parallelism of the rank that has most: of rows that begin or end there.
        """
        model = self.config.model
        if not self.config.train.carry_state:
            return 0.0
        states = sum(
            times * block_state_bytes(model, spec, ENDLESS)
            for spec, times in zip(block_specs(model), passes(model), strict=True)
        )
        together = parallel.micro_batch_size
        borders = zip(*homes_and_ends(together, parallel.context), strict=True)
        held = Counter(rank for pair in borders for rank in {*pair})
        rows = rows * max(held.values()) // together
        return rows * states / (parallel.tensor * parallel.pipeline)

    def _fills_late(self, parallel: ParallelConfig) -> bool:
        """Return whether gradients fill the memory of DeepSpeed's bucket one by one.

        They do on a CPU, as activations leave theirs, because the system gives memory to a process
        when it first writes there.
        """
        return parallel.zero_stage == 2 and self.hardware.device == "cpu"


def _largest_share(states: Sequence[tuple[int, float]], shards: int) -> float:
    """Return the most bytes that a process is dealt of tensors, (elements, bytes of state) each.

    As megatron-core's layer-wise optimizer deals: by size, forth and back over the processes.
    """
    shares = [0.0] * shards
    order = [*range(shards), *reversed(range(shards))]
    for number, (_, size) in enumerate(sorted(states, key=lambda state: state[0])):
        shares[order[number % len(order)]] += size
    return max(shares)
