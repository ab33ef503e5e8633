"""Weights and optimizer state where DeepSpeed keeps them, as boxes of the full model's tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.sharded_state import (
    MOMENTS,
    Boxes,
    State,
    add_boxes,
    flat_part,
    full_part,
    optimizer_key,
    weights_state,
    writes,
)
from pretrain.common.errors import UserError
from pretrain.model.language_model import LanguageModel
from pretrain.nn.parameters import info_of
from pretrain.optim import adamw
from pretrain.optim.backends.base import UpdateBackend
from pretrain.parallel.processes import data_parallel_rank_and_size


class DeepSpeedState(UpdateBackend):
    """The part of the backend that knows what DeepSpeed makes of parameters and their state.

    ``optimizer`` is DeepSpeed's.
    """

    optimizer: Any

    def _take(self, parts: Sequence[LanguageModel], stage: int) -> None:
        self.parts, self.stage = list(parts), stage
        self.replicas = data_parallel_rank_and_size()[1]
        self.low_precision = parts[0].context.dtype != torch.float32
        self._keys = (*MOMENTS, "param") if self.low_precision else MOMENTS
        self._named: list[tuple[str, Any]] = [
            named for part in self.parts for named in part.named_parameters()
        ]
        self._learning = [(name, p) for name, p in self._named if p.requires_grad]
        self._read: dict[tuple[str, int], Tensor] = {}  # out of files, while a checkpoint is loaded

    def weights_state(self, *, saving: bool) -> State:
        """Return every parameter by its name, as far as this process has it."""
        if self.stage < 3:
            return weights_state(self.parts, saving=saving)
        return {
            name: self._part_of_three(p, p.ds_tensor.data)
            for name, p in self._named
            if not saving or writes(name, p, replicas=1)
        }

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what this process updates, one copy of what several do; not what is in files."""
        for name, parameter in self._counted():
            if self.stage == 0:
                yield name, parameter
            elif self.stage == 3:
                yield name, self._held_of_three(parameter, self._flat_of_three(parameter, "param"))
            else:
                yield name, parameter._hp_mapping.hp_fragment

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield their gradients, as DeepSpeed has reduced them."""
        for name, parameter in self._counted():
            if self.stage == 0:
                if parameter.grad is not None:
                    yield name, parameter.grad
            elif self.stage == 3:
                values = self.optimizer.get_local_fp32_grad_for_param(parameter)
                yield name, self._held_of_three(parameter, values)
            else:
                mapping, index = parameter._hp_mapping, parameter._index_in_param_group
                values = mapping.get_lp_grad_fragment(index).view(-1)
                address = mapping.lp_fragment_address
                if values.numel() > address.numel:
                    values = values.narrow(0, address.start, address.numel)
                yield name, values

    def _counted(self) -> Iterator[tuple[str, Any]]:
        replicas = self.replicas if self.stage == 0 else 1
        for name, parameter in self._learning:
            here = self.stage not in (1, 2) or parameter._hp_mapping is not None
            if here and writes(name, parameter, replicas=replicas):
                yield name, parameter

    def _held_of_three(self, parameter: Any, values: Tensor) -> Tensor:
        """Return this process's values of a parameter without the padding behind the last."""
        start = data_parallel_rank_and_size()[0] * values.numel()
        return values.view(-1)[: max(0, min(values.numel(), parameter.ds_numel - start))]

    def optimizer_state(self, *, saving: bool) -> State:
        """Return the state of everything that this process updates."""
        state: State = {}
        self._read = self._read_files() if self.stage == 3 else {}
        for name, parameter in self._learning:
            replicas = self.replicas if self.stage == 0 else 1
            if saving and not writes(name, parameter, replicas=replicas):
                continue
            for key, boxes in self._optimizer_boxes(parameter):
                add_boxes(state, optimizer_key(key, name), boxes)
        if saving:
            self._read = {}
        return state

    def _optimizer_boxes(self, parameter: Any) -> Iterator[tuple[str, Boxes]]:
        keys = self._keys
        if self.stage == 0:
            for key in MOMENTS:
                yield key, full_part(parameter, self._moments(self.optimizer, parameter)[key])
        elif self.stage == 3:
            for key in keys:
                values = self._read.get((key, parameter.ds_id))
                if values is None:
                    values = self._flat_of_three(parameter, key)
                yield key, self._part_of_three(parameter, values)
        elif parameter._hp_mapping is not None:  # else another data-parallel process's
            start = parameter._hp_mapping.lp_fragment_address.start
            for key in keys:
                yield key, flat_part(parameter, start, self._flat_of_two(parameter, key))

    def _moments(self, optimizer: Any, main: Tensor) -> dict[str, Tensor]:
        moments: dict[str, Tensor] = optimizer.state[main]
        for key in MOMENTS:
            if key not in moments:
                moments[key] = torch.zeros_like(main)
        fused = adamw.implementation(main.device.type) == "fused"  # whose kernel reads it there
        moments.setdefault("step", torch.zeros((), device=main.device if fused else "cpu"))
        return moments

    def _mains(self) -> list[Any]:
        """Return what the optimizer updates: parameters, or this process's flat ranges of them."""
        if self.stage == 0:
            return [parameter for _, parameter in self._learning]
        if self.stage == 3:
            return list(self.optimizer.fp32_partitioned_groups_flat)
        return list(self.optimizer.single_partition_of_fp32_groups)

    def _flat_of_two(self, parameter: Any, key: str) -> Tensor:
        """Return this process's range of a flattened parameter, in float32 (ZeRO-1 and 2)."""
        mapping = parameter._hp_mapping
        if key == "param":
            return mapping.hp_fragment.data
        flat = self.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        address = mapping.hp_fragment_address
        moments = self._moments(self.optimizer.optimizer, flat)
        return moments[key].narrow(0, address.start, address.numel)

    def _flat_of_three(self, parameter: Any, key: str) -> Tensor:
        group, start, count = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        flat = self.optimizer.fp32_partitioned_groups_flat[group]
        source = flat.data if key == "param" else self._moments(self.optimizer.optimizer, flat)[key]
        return source.narrow(0, start, count)

    def _part_of_three(self, parameter: Any, values: Tensor) -> Boxes:
        """Return this process's box of a parameter that ZeRO-3 cuts in equal, padded ranges."""
        start = data_parallel_rank_and_size()[0] * values.numel()
        held = self._held_of_three(parameter, values)
        return flat_part(parameter, start, held, tuple(parameter.ds_shape))

    def loaded(self, num_updates: int, num_held: int = 0) -> None:
        """Set the step counts, and the copies that DeepSpeed keeps of what was loaded."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        for group, main in enumerate(self._mains()):
            with self._in_memory(group, changed=True):
                held = num_held * self._waits(group)
                self._moments(inner, main)["step"].fill_(float(num_updates - held))
                for parameter in self._of_group(group):
                    self._fill_three(parameter)
        self._read = {}
        if self.stage == 3:
            # Small parameters are gathered on every process after a step: what they were before.
            self.optimizer._partition_all_parameters()
        if self.low_precision or self.stage in (0, 3):
            return
        # float32: the weights are their own masters, but DeepSpeed keeps a copy.
        for _, parameter in self._learning:
            if parameter._hp_mapping is not None:
                parameter._hp_mapping.update_hp()

    def _waits(self, number: int) -> bool:
        """Return whether what the optimizer updates, by its number in ``_mains``, is to wait."""
        if self.stage == 0:
            return info_of(self._learning[number][1]).waits
        group = self.optimizer.sub_group_to_group_id[number] if self.stage == 3 else number
        return bool(self.optimizer.param_groups[group].get("waits"))

    def _uncount_held(self) -> None:
        """Have what was held begin with the first step in which it is not."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        for number, main in enumerate(self._mains()):
            if self._waits(number):
                self._moments(inner, main)["step"].zero_()

    def check_alignment(self) -> None:
        """Raise UserError where DeepSpeed would read a gradient from a file to unaligned memory.

        Direct reading cannot begin there, and DeepSpeed checks for no errors.
        """
        for name, parameter in self._learning:
            position = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            group, start, count = position
            moved = self.optimizer._swappable_optimizer_subgroup(group) and 4 * count >= 2**20
            if moved and start * 4 % 512:
                raise UserError(
                    f"parallel.offload is nvme, but on {self.replicas} data-parallel processes the "
                    f"gradient of {name} begins {start * 4} bytes into a file's, expected a "
                    "multiple of 512; use another number of processes, or offload=cpu"
                )

    def _fill_three(self, parameter: Any) -> None:
        """Copy back what was loaded for a parameter whose state is in files (ZeRO-3).

        In float32 also update the copy that DeepSpeed keeps of the weight.
        """
        for key in self._keys:
            if (key, parameter.ds_id) in self._read:
                self._flat_of_three(parameter, key).copy_(self._read[key, parameter.ds_id])
        if not self.low_precision:
            self._flat_of_three(parameter, "param").copy_(parameter.ds_tensor.data)

    def _of_group(self, group: int) -> list[Any]:
        """Return the parameters whose state DeepSpeed keeps, and moves, together (ZeRO-3)."""
        if self.stage < 3:
            return []
        positions = self.optimizer.grad_position
        return [
            p for _, p in self._learning if positions[self.optimizer.get_param_id(p)][0] == group
        ]

    def _read_files(self) -> dict[tuple[str, int], Tensor]:
        """Return copies of the optimizer's state as far as it is in files."""
        read: dict[tuple[str, int], Tensor] = {}
        for group in range(len(self._mains())):
            with self._in_memory(group) as moved:
                for parameter in self._of_group(group) if moved else ():
                    for key in self._keys:
                        read[key, parameter.ds_id] = self._flat_of_three(parameter, key).clone()
        return read

    @contextlib.contextmanager
    def _in_memory(self, group: int, *, changed: bool = False) -> Iterator[bool]:
        """Keep a group's state in memory while open; yields whether it is in files."""
        moved = self.stage == 3 and self.optimizer._swappable_optimizer_subgroup(group)
        if moved:
            self.optimizer._optimizer_states_and_gradient_swap_in(group)
        yield moved
        if moved and changed:
            self.optimizer._optimizer_states_and_gradient_swap_out(group)
        elif moved:
            self.optimizer._release_swap_buffers(group)
