"""One optimizer step: megatron-core's schedules, data parallel and distributed optimizer (ZeRO-1).

The same code runs on one process or many, over gloo or NCCL.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from pretrain.config import OptimizerConfig
from pretrain.data import Batch
from pretrain.models.language_model import LanguageModel
from pretrain.parallel import adamw
from pretrain.parallel.megatron_on_cpu import device_scope, model_scope
from pretrain.parallel.processes import data_parallel_place, local_device


@dataclass
class StepResult:
    """loss: mean over the global batch's counted targets, in nats, before the update; grad_norm:
    global, before clipping; applied: whether the parameters were updated."""

    loss: float
    grad_norm: float
    applied: bool


class Engine:
    """Owns the wrapped model and its optimizer; every data-parallel process holds one."""

    def __init__(self, model: LanguageModel, config: OptimizerConfig):
        adamw.install()
        self.model, self.config = model, config
        bf16 = model.context.dtype == torch.bfloat16
        model.config.finalize_model_grads_func = finalize_model_grads
        settings = MegatronOptimizerConfig(
            optimizer="adam", lr=config.lr, min_lr=0.0, weight_decay=config.weight_decay,
            adam_beta1=config.betas[0], adam_beta2=config.betas[1], adam_eps=config.eps,
            clip_grad=config.clip_grad, bf16=bf16, params_dtype=model.context.dtype,
            use_distributed_optimizer=True,
        )  # fmt: skip
        # Weight decay on matrices only; biases, norms, gates and convolutions are left alone.
        no_decay = ParamPredicate(name="no_decay", fn=lambda p: not p.decay)
        # The distributed optimizer's checkpoints mix up a group that holds parameters of two dtypes
        # (the float32 gates of a bf16 model): a mark that it keeps groups apart by, unused by us.
        wide = ParamPredicate(name="wide", fn=lambda p: p.dtype != model.context.dtype)
        overrides: dict[ParamKey, Any] = {
            ParamKey(predicate=no_decay): {"wd_mult": 0.0},
            ParamKey(predicate=wide): {"is_decoupled_lr": True},
        }
        with device_scope():
            self.wrapped = DistributedDataParallel(
                model.config,
                DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True, use_distributed_optimizer=True,
                    overlap_grad_reduce=data_parallel_place()[1] > 1,
                ),
                model,
            )  # fmt: skip
            self.optimizer = get_megatron_optimizer(
                settings, [self.wrapped], config_overrides=overrides
            )
        # Gradients are reduced once, behind the last micro-batch's backward pass.
        model.config.no_sync_func = self.wrapped.no_sync
        self._forward_backward = get_forward_backward_func()

    def train_step(self, batches: list[Batch], lr: float) -> StepResult:
        """Forward, backward and update over this process's micro-batches of the global batch.

        A loss or gradient norm that is not finite leaves parameters and optimizer untouched.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            # Also after a checkpoint, whose groups carry the settings of its own run.
            group["betas"], group["eps"] = tuple(self.config.betas), self.config.eps
            group["weight_decay"] = self.config.weight_decay * group["wd_mult"]
        with device_scope():
            self.wrapped.zero_grad_buffer()
            self.optimizer.zero_grad()
            loss = self._run(batches, forward_only=False)
            self.optimizer.prepare_grads()
            norm = self.optimizer.get_grad_norm()
            finite = _all_finite(loss, norm)
            if finite:
                if self.config.clip_grad > 0:
                    self._clip(norm)
                self.optimizer.step_with_ready_grads()
        return StepResult(loss=float(loss), grad_norm=float(norm), applied=finite)

    def _clip(self, norm: float) -> None:
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

        for optimizer in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            clip_grad_by_total_norm_fp32(
                optimizer.get_parameters(), max_norm=self.config.clip_grad, total_norm=norm
            )

    @torch.no_grad()
    def validate(
        self, batches: list[Batch], bytes_per_token: Tensor | None = None
    ) -> tuple[float, int, int]:
        """(mean loss in nats, counted targets, bytes of text they stand for) of all processes.

        ``bytes_per_token`` is ``[vocab]``; without it the bytes are 0.
        """
        self.model.eval()
        total, count = 0.0, 0.0
        if batches:
            with device_scope():
                total, count = self._sums(batches, forward_only=True).tolist()
        text_bytes = 0.0
        if bytes_per_token is not None:
            for batch in batches:
                text_bytes += float((bytes_per_token[batch.targets] * batch.loss_mask).sum())
        sums = torch.tensor([total, count, text_bytes], dtype=torch.float64, device=local_device())
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        self.model.train()
        return float(sums[0] / sums[1].clamp_min(1)), int(sums[1]), int(sums[2])

    def _run(self, batches: list[Batch], *, forward_only: bool) -> float:
        sums = self._sums(batches, forward_only=forward_only)
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        return float(sums[0] / sums[1].clamp_min(1))

    def _sums(self, batches: list[Batch], *, forward_only: bool) -> Tensor:
        """``[2]`` float64: summed loss and number of counted targets of these micro-batches."""
        results = self._forward_backward(
            forward_step_func=_forward_step, data_iterator=iter(batches), model=self.wrapped,
            num_microbatches=len(batches), seq_length=batches[0].tokens.shape[1],
            micro_batch_size=1, forward_only=forward_only,
        )  # fmt: skip
        return torch.stack([r["sums"] for r in results]).sum(0)


def _forward_step(
    batches: Iterator[Batch], model: DistributedDataParallel
) -> tuple[Tensor, partial[Any]]:
    batch = next(batches).to(local_device())
    with model_scope():
        losses = model(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens)
    return losses, partial(_loss, mask=batch.loss_mask)


def _loss(losses: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What megatron-core wants: the summed loss, the number of targets, and what to report.

    Gradients are divided by the number of targets of the whole global batch, not per micro-batch.
    """
    with model_scope():
        total, count = (losses * mask).sum(), mask.sum()
        sums = torch.stack([total.detach().double(), count.double()])
        return total, count.int(), {"sums": sums}


def _all_finite(loss: float, norm: float) -> bool:
    return bool(torch.isfinite(torch.tensor([loss, norm])).all())
