"""Gradients and updates by megatron-core: data parallel, and its optimizer, whole on each process
(ZeRO-0) or divided over the data-parallel ones (ZeRO-1)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
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
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from torch import Tensor, nn

from pretrain.config import OptimizerConfig, ParallelConfig
from pretrain.data.batches import Batch
from pretrain.model.language_model import LanguageModel
from pretrain.nn.linear import draw_like
from pretrain.optim import adamw
from pretrain.optim.gradient_norm import global_norm
from pretrain.parallel.cpu import device_scope
from pretrain.parallel.pipeline import run_schedule
from pretrain.parallel.processes import data_parallel_rank_and_size
from pretrain.parallel.sharded_state import (
    State,
    flat_part,
    optimizer_key,
    weights_state,
    whole_part,
    writes,
)

# Parameters of two dtypes lie in buckets of their own: neither order is the one of use.
warnings.filterwarnings("ignore", "The next bucket's parameter all-gather")


def _gather_before_use(wrapped: Any, part: LanguageModel) -> None:
    """megatron-core waits for the parameters of a module when that module is called. Ours also use
    weights of modules that they do not call: wait for all of a block, and of the head."""

    def wait(parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.requires_grad:
                wrapped.param_to_bucket_group[parameter].finish_param_sync()

    def register(module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        module.register_forward_pre_hook(lambda *_: wait(parameters))

    for index in part.stage.blocks:
        register(part.blocks[index], list(part.blocks[index].parameters()))
    if part.stage.last:
        head = part.embedding if part.model_config.tie_embeddings else part.head
        register(part.final_norm, [*part.final_norm.parameters(), *head.parameters()])


def _finalize_gradients(
    modules: Sequence[Any], num_targets: Tensor | None = None, **options: Any
) -> None:
    """megatron-core's, and the mean over targets without its look at their number, for which the
    host would wait."""
    finalize_model_grads(modules, None, **options)
    if num_targets is None:
        return
    dist.broadcast(
        num_targets,
        parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    dist.all_reduce(
        num_targets, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    for module in modules:
        module.scale_gradients(1.0 / num_targets.clamp(min=1))


def _is_hidden_matrix(parameter: Any) -> bool:
    return getattr(parameter, "hidden_matrix", False)


def _lr_mult(parameter: Any) -> float:
    return getattr(parameter, "lr_mult", 1.0)


_Place = tuple[torch.optim.Optimizer, dict[str, Any]]  # an optimizer and one of its groups


class MegatronBackend:
    """Owns the wrapped stages and their optimizer."""

    step_seed = (0, 0)  # (seed of the run, step), for the gradient noise

    def __init__(
        self, parts: Sequence[LanguageModel], config: OptimizerConfig, parallel: ParallelConfig
    ):
        adamw.install()
        self.parts, self.config, self.divided = list(parts), config, parallel.zero_stage == 1
        self.replicas = data_parallel_rank_and_size()[1]
        megatron, dtype = parts[0].config, parts[0].context.dtype
        self.narrow = dtype != torch.float32
        megatron.finalize_model_grads_func = _finalize_gradients
        settings = MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=0.0,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=self.divided,
        )
        # Weight decay on matrices only; biases, norms, gates and convolutions are left alone.
        no_decay = ParamPredicate(name="no_decay", fn=lambda p: not p.decay)
        # The distributed optimizer's checkpoints mix up a group that holds parameters of two dtypes
        # (the float32 gates of a bf16 model): a mark that it keeps groups apart by, unused by us.
        wide = ParamPredicate(name="wide", fn=lambda p: p.dtype != dtype)
        overrides: dict[ParamKey, Any] = {
            ParamKey(predicate=no_decay): {"wd_mult": 0.0},
            ParamKey(predicate=wide): {"is_decoupled_lr": True},
        }
        if config.kind == "muon":
            muon = ParamPredicate(name="muon", fn=_is_hidden_matrix)
            overrides[ParamKey(predicate=muon)] = {"muon": True}
        slower = {_lr_mult(p) for part in parts for p in part.parameters()} - {1.0}
        for number in slower:
            same = ParamPredicate(name=f"lr {number}", fn=lambda p, n=number: _lr_mult(p) == n)
            overrides[ParamKey(predicate=same)] = {"lr_mult": number}
        overlap = parallel.overlap and self.replicas > 1
        # Parameters are gathered when the next forward pass comes to them.
        self.gathers_late = overlap and self.divided
        with device_scope():
            # Buckets for every part, although megatron-core's own training loop has them for the
            # first alone: without, bf16 and float32 parameters are gathered in one call, which gloo
            # takes for tensors of one dtype and mixes up.
            self.modules: list[Any] = [
                DistributedDataParallel(
                    megatron,
                    DistributedDataParallelConfig(
                        grad_reduce_in_fp32=True,
                        use_distributed_optimizer=self.divided,
                        overlap_grad_reduce=overlap,
                        overlap_param_gather=self.gathers_late,
                    ),
                    part,
                )
                for part in parts
            ]
            if self.gathers_late:
                for module, part in zip(self.modules, parts, strict=True):
                    _gather_before_use(module, part)
            self.optimizer = get_megatron_optimizer(
                settings, self.modules, config_overrides=overrides
            )
        # Gradients are reduced once, behind the last micro-batch's backward pass.
        pauses = [module.no_sync for module in self.modules]
        megatron.no_sync_func = pauses if len(pauses) > 1 else pauses[0]

    def gradients(self, batches: Sequence[Batch]) -> Tensor:
        """Gradients of the global batch's mean loss; returns as :func:`run_schedule`."""
        with device_scope():
            for module in self.modules:
                module.zero_grad_buffer()
            self.optimizer.zero_grad()
        return run_schedule(self.modules, batches, forward_only=False)

    def apply(self, lr: float, loss: float) -> tuple[float, bool]:
        """(global gradient norm before clipping, whether the parameters were updated)."""
        self._settle_groups()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
            # Also after a checkpoint, whose groups carry the settings of its own run. Nothing in
            # megatron-core's optimizer applies wd_mult: it would decay every group.
            group["betas"], group["eps"] = tuple(self.config.betas), self.config.eps
            group["weight_decay"] = self.config.weight_decay * group["wd_mult"]
        with device_scope():
            self.optimizer.prepare_grads()
            norm = self._gradient_norm()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                return norm, False
            if self.config.clip_grad > 0:
                self._clip(norm)
            if self.config.gradient_noise > 0:
                self._add_noise()
            self.optimizer.step_with_ready_grads()
        return norm, True

    def _settle_groups(self) -> None:
        for group in self.optimizer.param_groups:
            group["ema_decay"] = self.config.ema_decay
            group["muon_momentum"] = self.config.muon_momentum

    def _add_noise(self) -> None:
        """arXiv 1511.06807, equation 1, gamma = 0.55; the same under every layout."""
        seed, step = self.step_seed
        std = (self.config.gradient_noise / (1 + step) ** 0.55) ** 0.5
        for name, parameter, _, main, start in self._mains():
            noise = draw_like(parameter, std, f"{seed}:{step}:{name}")
            if start is not None:
                noise = noise.view(-1)[start : start + main.numel()]
            main.grad.add_(noise.view_as(main.grad))

    def _gradient_norm(self) -> float:
        """Experts have an optimizer of their own, and groups of their own that divide them."""
        return math.hypot(
            *(
                global_norm(
                    list(o.get_main_grads_for_grad_norm()), o.get_grad_stats_parallel_group()
                )
                for o in self._optimizers()
            )
        )

    def _clip(self, norm: float) -> None:
        for optimizer in self._optimizers():
            clip_grad_by_total_norm_fp32(
                optimizer.get_parameters(), max_norm=self.config.clip_grad, total_norm=norm
            )

    def _optimizers(self) -> list[Any]:
        return getattr(self.optimizer, "chained_optimizers", [self.optimizer])

    def gather_weights(self) -> None:
        """Gather what the next forward pass would have; every process must call."""
        if self.gathers_late:
            with device_scope():
                for module in self.modules:
                    module.start_param_sync(force_sync=True)

    def weights_state(self, *, saving: bool) -> State:
        """Every parameter by its name."""
        if saving:
            self.gather_weights()
        return weights_state(self.parts, saving=saving)

    def optimizer_state(self, *, saving: bool) -> State:
        """exp_avg, exp_avg_sq and, where weights are narrower, the float32 weight of everything
        that this process updates; the tensors are the optimizer's own."""
        state: State = {}
        self._settle_groups()
        replicas = 1 if self.divided else self.replicas
        for name, parameter, place, main, start in self._mains():
            if saving and not writes(name, parameter, replicas=replicas):
                continue
            for key, tensor in self._tensors(place, main).items():
                state[optimizer_key(key, name)] = (
                    whole_part(parameter, tensor)
                    if start is None
                    else flat_part(parameter, start, tensor.view(-1))
                )
        return state

    def _mains(self) -> Iterator[tuple[str, nn.Parameter, _Place, Any, int | None]]:
        """Of all that this process updates: name, parameter, where it is, the tensor that is
        updated, and where in the flattened parameter that begins, None: it is all of it."""
        places = {
            id(main): (optimizer.optimizer, group)
            for optimizer in self._optimizers()
            for group in optimizer.optimizer.param_groups
            for main in group["params"]
        }
        for part in self.parts:
            for name, parameter in part.named_parameters():
                if not parameter.requires_grad:
                    continue
                if self.divided:
                    main, start = self._divided_main(parameter)
                else:
                    main, start = getattr(parameter, "main_param", None), None
                    main = parameter if main is None else main
                if main is not None:
                    yield name, parameter, places[id(main)], main, start

    def _divided_main(self, parameter: nn.Parameter) -> tuple[Tensor | None, int | None]:
        for optimizer in self._optimizers():
            where = optimizer.model_param_group_index_map.get(parameter)
            if where is not None:
                main = optimizer.optimizer.param_groups[where[0]]["params"][where[1]]
                return main, optimizer._get_model_param_range_map(parameter)["param"].start
        return None, None  # another data-parallel process's

    def _tensors(self, place: _Place, main: Tensor) -> dict[str, Tensor]:
        optimizer, group = place
        moments = optimizer.state[main]
        adamw.fill_state(moments, main, group)
        found = {key: moments[key] for key in adamw.state_keys(group)}
        return {**found, "param": main} if self.narrow else found

    def loaded(self, updates: int) -> None:
        """Called when weights and optimizer state have been loaded, of so many updates."""
        for optimizer in self._optimizers():
            for group in optimizer.optimizer.param_groups:
                group["step"] = updates
