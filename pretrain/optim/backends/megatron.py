"""Gradients and updates by megatron-core.

That is its data parallel and its optimizer, replicated (ZeRO-0) or sharded over the data-parallel
ranks (ZeRO-1): by ranges of the flattened parameters, or by whole parameters where the rule needs
them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.checkpoint.sharded_state import (
    State,
    add_boxes,
    flat_part,
    full_part,
    optimizer_key,
    weights_state,
    writes,
)
from pretrain.config import OptimizerConfig, ParallelConfig
from pretrain.config.optimizer import WHOLE_MATRICES
from pretrain.data.batch import Batch
from pretrain.model.language_model import LanguageModel
from pretrain.model.shared import sum_tables
from pretrain.nn.parameters import draw_like, info_of
from pretrain.optim.backends.base import UpdateBackend
from pretrain.optim.backends.layer_wise import layer_wise_optimizer
from pretrain.optim.gradient_norm import global_norm
from pretrain.optim.optimizer import fill_state, lr_multiple, rule, state_keys, used_by_megatron
from pretrain.parallel.cpu import device_scope, importing_megatron
from pretrain.parallel.megatron import prepare
from pretrain.parallel.pipeline import run_schedule
from pretrain.parallel.processes import replica_rank_and_size

with importing_megatron():
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


def _gather_before_use(wrapped: Any, part: LanguageModel) -> None:
    """Wait for all parameters of a block, and of the head, before it runs.

    megatron-core waits for the parameters of a module when that module is called; ours also use
    weights of modules that they do not call.
    """

    def wait(parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.requires_grad:
                wrapped.param_to_bucket_group[parameter].finish_param_sync()

    def register(module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        module.register_forward_pre_hook(lambda *_: wait(parameters))

    for index in part.stage.blocks:
        register(part.blocks[index], list(part.blocks[index].parameters()))
    for table in part.tables.modules():
        register(table, list(table.parameters(recurse=False)))
    if part.stage.last:
        head = part.embedding if part.model_config.tie_embeddings else part.head
        register(part.final_norm, [*part.final_norm.parameters(), *head.parameters()])


@contextlib.contextmanager
def _paused(wrapped: Any) -> Iterator[None]:
    """Have gradients add up without being reduced, while open; unlike ``no_sync`` it nests."""
    groups = wrapped.bucket_groups + wrapped.expert_parallel_bucket_groups
    before = [group.is_last_microbatch for group in groups]
    with wrapped.no_sync():
        yield
    for group, last in zip(groups, before, strict=True):
        group.is_last_microbatch = last


def _finalize_gradients(
    modules: Sequence[Any], num_targets: Tensor | None = None, **options: Any
) -> None:
    """Finalise gradients as megatron-core does, and take the mean over targets.

    megatron-core's own mean looks at their number, for which the host would wait.
    """
    finalize_model_grads(modules, None, **options)
    parts = [module.module for module in modules]
    sum_tables(parts, lambda weight: cast(Any, weight).main_grad)
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


_Home = tuple[torch.optim.Optimizer, dict[str, Any]]  # an optimizer and one of its groups


class MegatronBackend(UpdateBackend):
    """megatron-core's data parallel around the stages, and its optimizer."""

    def __init__(
        self,
        parts: Sequence[LanguageModel],
        config: OptimizerConfig,
        parallel: ParallelConfig,
    ):
        self.parts, self.config = list(parts), config
        self.replicas = replica_rank_and_size()[1]
        whole = config.kind in WHOLE_MATRICES
        self.sharded = parallel.zero_stage == 1 and not whole
        self.layer_wise = parallel.zero_stage == 1 and whole and self.replicas > 1
        self.low_precision = parts[0].context.dtype != torch.float32
        megatron = prepare(parts)
        megatron.finalize_model_grads_func = _finalize_gradients
        overlap = parallel.overlap and self.replicas > 1
        # Parameters are gathered when the next forward pass comes to them.
        self.gathers_late = overlap and self.sharded
        with device_scope():
            # Buckets for every part, although megatron-core's own training loop has them for the
            # first alone: without, bf16 and float32 parameters are gathered in one call, which gloo
            # takes for tensors of one dtype and mixes up.
            settings = DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=self.sharded,
                overlap_grad_reduce=overlap,
                overlap_param_gather=self.gathers_late,
            )
            self.modules = [DistributedDataParallel(megatron, settings, part) for part in parts]
            if self.gathers_late:
                for module, part in zip(self.modules, parts, strict=True):
                    _gather_before_use(module, part)
            self.optimizer = self._make_optimizer()
        for part in parts:
            if part.distilled is not None:  # whoever reduces gradients waits for all of them
                part.distilled.touches = True
        for module, part in zip(self.modules, parts, strict=True):
            if part.segment_tokens is not None:
                part.reduction_paused = partial(_paused, module)
        # Gradients are reduced once, after the last micro-batch's backward pass.
        pauses: list[Any] = [module.no_sync for module in self.modules]
        megatron.no_sync_func = pauses if len(pauses) > 1 else pauses[0]

    def _make_optimizer(self) -> Any:
        config, dtype = self.config, self.parts[0].context.dtype
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
            use_distributed_optimizer=self.sharded,
        )
        # Its groups: by what differs between parameters in the update. Of two dtypes (the float32
        # gates of a bf16 model) the distributed optimizer's checkpoints mix up a group.
        groups: dict[str, tuple[Any, dict[str, Any]]] = {
            "no weight decay": (lambda p: not info_of(p).weight_decay, {"wd_mult": 0.0}),
            "float32": (lambda p: p.dtype != dtype, {"dtype_group": "float32"}),
        }
        if config.kind != "adamw":
            selects = rule(config.kind).selects
            groups[config.kind] = (lambda p: selects(info_of(p)), {"rule": config.kind})
        parameters = [p for part in self.parts for p in part.parameters()]
        if any(info_of(p).waits for p in parameters):
            groups["waiting"] = (lambda p: info_of(p).waits, {"waits": True})
        multiples = {lr_multiple(info_of(p), config.kind, config.lr) for p in parameters}
        for number in multiples - {1.0}:
            groups[f"lr {number}"] = (
                lambda p, n=number: lr_multiple(info_of(p), config.kind, config.lr) == n,
                {"lr_mult": number},
            )
        overrides: dict[ParamKey, Any] = {
            ParamKey(predicate=ParamPredicate(name=name, fn=selects)): changes
            for name, (selects, changes) in groups.items()
        }

        def make(settings: MegatronOptimizerConfig) -> Any:
            with used_by_megatron():
                return get_megatron_optimizer(settings, self.modules, config_overrides=overrides)

        return layer_wise_optimizer(settings, make) if self.layer_wise else make(settings)

    def forward_backward(self, batches: Sequence[Batch]) -> Tensor:
        """Run the micro-batches through megatron-core's schedule."""
        with device_scope():
            for module in self.modules:
                module.zero_grad_buffer()
            self.optimizer.zero_grad()
        return run_schedule(self.modules, batches, forward_only=False)

    def optimizer_step(self, lr: float, loss: float) -> tuple[float, bool]:
        """Clip, add noise if wanted, and update; skip the update where something is not finite."""
        self.set_hyperparameters(self.optimizer.param_groups, lr)
        with device_scope():
            self.optimizer.prepare_grads()
            norm = self._gradient_norm()
            self._tell_of_gradients()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                return norm, False
            if self.config.clip_grad > 0:
                self._clip(norm)
            if self.config.gradient_noise > 0:
                self._add_noise()
            self.optimizer.step_with_ready_grads()
            if self.layer_wise:
                self.optimizer.allgather_params()
        for group in self.optimizer.param_groups:
            if group.get("held"):
                group["step"] = 0  # which a fused optimizer has counted
        return norm, True

    def _add_noise(self) -> None:
        """Add noise (arXiv 1511.06807, equation 1, gamma = 0.55), the same under every layout."""
        seed, step = self.step_seed
        std = (self.config.gradient_noise / (1 + step) ** 0.55) ** 0.5
        for name, parameter, _, main, start in self._mains():
            noise = draw_like(parameter, std, f"{seed}:{step}:{name}")
            if start is not None:
                noise = noise.view(-1)[start : start + main.numel()]
            main.grad.add_(noise.view_as(main.grad))

    def _gradient_norm(self) -> float:
        """Return the global norm; experts have a separate optimizer and separate groups."""
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
        """Gather the weights now that the next forward pass would gather."""
        if self.gathers_late:
            with device_scope():
                for module in self.modules:
                    module.start_param_sync(force_sync=True)

    def weights_state(self, *, saving: bool) -> State:
        """Return every weight by its name, gathered if they are to be saved."""
        if saving:
            self.gather_weights()
        return weights_state(self.parts, saving=saving)

    def optimizer_state(self, *, saving: bool) -> State:
        """Return the state of everything that this process updates."""
        state: State = {}
        self.set_hyperparameters(self.optimizer.param_groups, 0.0)
        replicas = 1 if self.sharded or self.layer_wise else self.replicas
        for name, parameter, home, main, start in self._mains():
            if saving and not writes(name, parameter, replicas=replicas):
                continue
            for key, tensor in self._tensors(home, main).items():
                boxes = (
                    full_part(parameter, tensor)
                    if start is None
                    else flat_part(parameter, start, tensor.view(-1))
                )
                add_boxes(state, optimizer_key(key, name), boxes)
        return state

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what this process updates, one copy of what several do."""
        replicas = 1 if self.sharded or self.layer_wise else self.replicas
        for name, parameter, _, main, _ in self._mains():
            if writes(name, parameter, replicas=replicas):
                yield name, main

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield their gradients."""
        return ((name, main.grad) for name, main in self.masters() if main.grad is not None)

    def _mains(self) -> Iterator[tuple[str, nn.Parameter, _Home, Any, int | None]]:
        """Walk over all that this process updates.

        Yields name, parameter, its optimizer and group, the tensor that is updated, and where in
        the flattened parameter that tensor begins (None: it is all of it).
        """
        homes = {
            id(main): (optimizer.optimizer, group)
            for optimizer in self._optimizers()
            for group in optimizer.optimizer.param_groups
            for main in group["params"]
        }
        for part in self.parts:
            for name, parameter in part.named_parameters():
                if not parameter.requires_grad:
                    continue
                if self.sharded:
                    main, start = self._sharded_main(parameter)
                else:
                    main, start = getattr(parameter, "main_param", None), None
                    main = parameter if main is None else main
                if id(main) in homes:  # otherwise another data-parallel process's
                    yield name, parameter, homes[id(main)], main, start

    def _sharded_main(self, parameter: nn.Parameter) -> tuple[Tensor | None, int | None]:
        for optimizer in self._optimizers():
            where = optimizer.model_param_group_index_map.get(parameter)
            if where is not None:
                main = optimizer.optimizer.param_groups[where[0]]["params"][where[1]]
                return main, optimizer._get_model_param_range_map(parameter)["param"].start
        return None, None

    def _tensors(self, home: _Home, main: Tensor) -> dict[str, Tensor]:
        optimizer, group = home
        moments = optimizer.state[main]
        fill_state(moments, main, group)
        found = {key: moments[key] for key in state_keys(group)}
        return {**found, "param": main} if self.low_precision else found

    def loaded(self, num_updates: int, num_held: int = 0) -> None:
        """Set the step counts of the optimizer's groups."""
        for optimizer in self._optimizers():
            for group in optimizer.optimizer.param_groups:
                group["step"] = num_updates - num_held * bool(group.get("waits"))
