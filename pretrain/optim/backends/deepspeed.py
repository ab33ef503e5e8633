"""Gradients and updates by DeepSpeed.

ZeRO-0 and 1 run under megatron-core's schedules, ZeRO-2 and 3 with DeepSpeed's own backward pass;
the optimizer's state is held in host memory or in files if wanted.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.common.errors import UserError
from pretrain.config import OptimizerConfig, ParallelConfig
from pretrain.data.batch import Batch
from pretrain.model.language_model import LanguageModel
from pretrain.model.shared import sum_tables
from pretrain.nn.parameters import info_of
from pretrain.optim import adamw
from pretrain.optim.backends.deepspeed_state import DeepSpeedState
from pretrain.optim.backends.offload_folder import make_offload_folder
from pretrain.optim.gradient_norm import global_norm
from pretrain.optim.optimizer import lr_multiple
from pretrain.parallel.cpu import device_scope, importing_megatron, uncompiled_functions
from pretrain.parallel.megatron import prepare
from pretrain.parallel.pipeline import no_sums, run_schedule, weighted_losses
from pretrain.parallel.processes import local_device, name_local_rank

with importing_megatron():
    from megatron.core import parallel_state
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

_BUCKET = 200_000_000  # elements of a gradient bucket at most: DeepSpeed allocates all of it
_IN_FILES = 100_000_000  # parameters whose state is in memory at once, where it is in files


class _Topology:
    """megatron-core's process groups under the names that DeepSpeed asks for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(parallel_state, name)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(parallel_state.get_model_parallel_group())

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(parallel_state.get_model_parallel_group())

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(parallel_state.get_data_parallel_group())


def _import_deepspeed() -> Any:
    """Import it quietly, on a CPU without the shared-memory extension that it would compile."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            import deepspeed
        except ImportError:
            raise UserError(
                "parallel.zero_backend is deepspeed, which is not installed: pip install deepspeed"
            ) from None
        # As an attribute of deepspeed.comm the name means torch itself.
        backend: Any = importlib.import_module("deepspeed.comm.torch")
        # It asks of every optimizer whether it is this one, which none of ours is.
        with uncompiled_functions():
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    name_local_rank()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        backend.build_shm_op = lambda: None
    return deepspeed


def shard_parameters(unit: nn.Module, dtype: torch.dtype) -> None:
    """Shard a unit's parameters over the data-parallel ranks (ZeRO-3), in a model of ``dtype``.

    The next unit can then be made without room for the full model. Every process must call.
    """
    if not any(True for _ in unit.parameters()):
        return
    if dtype == torch.bfloat16:
        unit.bfloat16()  # as DeepSpeed does later with all of a bf16 model
    partition: Any = _import_deepspeed().zero.Init
    partition(
        unit,
        data_parallel_group=parallel_state.get_data_parallel_group(),
        dtype=next(unit.parameters()).dtype,
    )


class DeepSpeedBackend(DeepSpeedState):
    """The owner of DeepSpeed's engine around this process's stages."""

    def __init__(
        self,
        parts: Sequence[LanguageModel],
        config: OptimizerConfig,
        parallel: ParallelConfig,
    ):
        # Before DeepSpeed shards the parameters: names, shapes and marks are the model's own.
        self._take(parts, parallel.zero_stage)
        self.config, dtype = config, parts[0].context.dtype
        self._own_backward = self.stage > 1
        self._scale = 1.0
        self._sequence = [p for _, p in self._learning if info_of(p).sum_gradient]
        megatron = prepare(parts)
        if self._own_backward:
            for parameter in self._sequence:
                parameter.register_hook(_summed_over_tensor_parallel)
            for part in self.parts:
                if part.recursion is not None:
                    part.recursion.in_step = True
        else:
            megatron.grad_scale_func = lambda loss: loss * self._scale
        self._engine = self._initialize(dtype, parallel)
        self.optimizer = self._engine.optimizer
        self.modules: list[Any] = list(self.parts)
        if parallel.offload == "nvme":
            self.check_alignment()
        self.loaded(0)

    def _initialize(self, dtype: torch.dtype, parallel: ParallelConfig) -> Any:
        deepspeed = _import_deepspeed()
        parameters: list[Any] = [p for _, p in self._learning]
        groups: dict[tuple[float, float, bool], list[Any]] = {}
        for p in parameters:
            info = info_of(p)
            multiple = lr_multiple(info, self.config.kind, self.config.lr)
            key = (float(info.weight_decay), multiple, info.waits)
            groups.setdefault(key, []).append(p)
        # Where the state is elsewhere, so is the update.
        home = local_device().type if parallel.offload == "device" else "cpu"
        # Without a learning rate at first: ZeRO-3 begins with a step that only makes state.
        optimizer = torch.optim.AdamW(
            [
                {"params": groups[key], "wd_mult": key[0], "lr_mult": key[1], "waits": key[2]}
                for key in sorted(groups, reverse=True)
            ],
            lr=0.0,
            betas=(self.config.betas[0], self.config.betas[1]),
            eps=self.config.eps,
            **{adamw.implementation(home): True},
        )
        total = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
        zero: dict[str, Any] = {
            "stage": self.stage,
            "overlap_comm": parallel.overlap and self.stage > 1 and torch.cuda.is_available(),
            "reduce_bucket_size": min(_BUCKET, total),
            # What is smaller stays replicated; DeepSpeed's own default is for models
            # of many millions.
            "stage3_param_persistence_threshold": min(100_000, total // 100),
        }
        if parallel.offload != "device":
            zero["offload_optimizer"] = {
                "device": parallel.offload,
                "pin_memory": torch.cuda.is_available(),
            }
        if parallel.offload == "nvme":
            zero["offload_optimizer"]["nvme_path"] = str(
                make_offload_folder(parallel, -(-total // self.replicas))
            )
            zero["sub_group_size"] = _IN_FILES
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # of any number; steps say which one is their last
            "gradient_clipping": self.config.clip_grad if self.stage else 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "steps_per_print": None,
        }
        module = self.parts[0] if self._own_backward else nn.ModuleList(self.parts)
        with contextlib.redirect_stdout(io.StringIO()):
            engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=settings,
                mpu=_Topology(),
                dist_init_required=False,
            )
        return engine

    def forward_backward(self, batches: Sequence[Batch]) -> Tensor:
        """Run the micro-batches by megatron-core's schedule, or by DeepSpeed's own backward."""
        count = torch.stack([batch.loss_mask.sum() for batch in batches]).sum().double()
        count = count.to(local_device())
        dist.all_reduce(count, group=parallel_state.get_data_parallel_group())
        # DeepSpeed takes the mean over data-parallel processes; wanted is the sum over all targets.
        self._scale = self.replicas / max(float(count), 1.0)
        if self._own_backward:
            return self._own_forward_backward(batches)
        self._engine.zero_grad()
        sums = run_schedule(self.parts, batches, forward_only=False)
        tensor_group = parallel_state.get_tensor_model_parallel_group()
        for parameter in self._sequence:
            dist.all_reduce(_gradient(parameter), group=tensor_group)
        self._sum_tied_embeddings()
        sum_tables(self.parts, _gradient)
        return sums

    def _own_forward_backward(self, batches: Sequence[Batch]) -> Tensor:
        if self.stage == 3:
            # It keeps the last step's gradient of a parameter that has none in this one.
            self.optimizer.grad_partitions_flat_buffer.zero_()
        sums = no_sums(batches)
        for number, batch in enumerate(batches, 1):
            self._engine.set_gradient_accumulation_boundary(number == len(batches))
            batch = batch.to(local_device())
            losses = self._engine(batch.tokens, batch.targets, **batch.seen)
            total, found = weighted_losses(losses, batch)
            sums += found
            self._engine.backward(total * self._scale)
            if number < len(batches):
                self._engine.step()  # counts the micro-batch; optimizer_step does the last one's
        return sums

    def _sum_tied_embeddings(self) -> None:
        group = parallel_state.get_embedding_group(check_initialized=False)
        if group is None or dist.get_world_size(group) == 1:
            return
        for part in self.parts:
            weight = part.shared_embedding_or_output_weight()
            learns = weight is not None and weight.requires_grad
            if part.share_embeddings_and_output_weights and weight is not None and learns:
                dist.all_reduce(_gradient(weight), group=group)

    def optimizer_step(self, lr: float, loss: float) -> tuple[float, bool]:
        """Update by DeepSpeed, which skips a step whose gradients are not finite."""
        self.set_hyperparameters(self.optimizer.param_groups, lr)
        found = self._update(loss)
        if self.holding:
            self._uncount_held()
        return found

    def _update(self, loss: float) -> tuple[float, bool]:
        if self.stage == 0:
            return self._step_replicated(loss)
        if not self._own_backward:
            self.optimizer.reduce_gradients(pipeline_parallel=True)
            self._tell_of_gradients()
            self.optimizer.step()
            self.optimizer.zero_grad()
        else:
            self._tell_of_gradients()
            self._engine.step()
        return float(self.optimizer._global_grad_norm), not self.optimizer.overflow

    def _step_replicated(self, loss: float) -> tuple[float, bool]:
        """Update under ZeRO-0: DeepSpeed reduces, but its own clipping reports no norm."""
        self._engine.allreduce_gradients()
        self._tell_of_gradients()
        parameters = [p for _, p in self._learning]
        counted = [
            _gradient(p)
            for p in parameters
            if param_is_not_tensor_parallel_duplicate(p) and not info_of(p).copy
        ]
        norm = global_norm(counted, parallel_state.get_model_parallel_group())
        with device_scope():
            if not (math.isfinite(loss) and math.isfinite(norm)):
                return norm, False
            if self.config.clip_grad > 0:
                clip_grad_by_total_norm_fp32(parameters, self.config.clip_grad, norm)
        self.optimizer.step()
        return norm, True

    def forget_gradients(self) -> None:
        """Have DeepSpeed skip the step that its own backward passes have begun."""
        if not self._own_backward:
            return
        if self.stage == 3:  # what it skips a step by
            found: dict[str, Any] = {"_get_norm_groups": lambda: [math.nan]}
        else:
            found = {"check_grad_overflow": True, "has_overflow": lambda *_, **__: True}
        kept = {name: vars(self.optimizer)[name] for name in found if name in vars(self.optimizer)}
        vars(self.optimizer).update(found)
        try:
            self._engine.step()
        finally:
            for name in found:
                del vars(self.optimizer)[name]
            vars(self.optimizer).update(kept)

    def gather_weights(self) -> None:
        """Return at once: DeepSpeed's step ends with gathered weights, or ZeRO-3 has none."""


def _gradient(parameter: Any) -> Tensor:
    """Return a gradient, zeros where nothing flowed back: every process takes part in a sum."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _summed_over_tensor_parallel(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    dist.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
    return gradient
