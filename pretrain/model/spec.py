"""From a model's settings to its list of blocks, without building anything."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from pretrain.common.config_loader import ConfigError, build_config, nearest
from pretrain.config import ModelConfig, MoEConfig, RecursionConfig
from pretrain.model.pattern import parse_pattern
from pretrain.nn.mixers import LayerContext, Mixer, registry
from pretrain.nn.mixers.base import SHAREABLE
from pretrain.nn.mlp import mlp_parameters
from pretrain.nn.moe import MoE


@dataclass(frozen=True)
class BlockSpec:
    """One block: the mixer's name in the pattern, its class and its settings, and the mixture of
    experts that it has instead of an MLP."""

    name: str
    mixer: type[Mixer]
    config: Any
    moe: MoEConfig | None = None

    @property
    def kind(self) -> str:
        """Blocks of the same kind have the same shapes and cost the same."""
        return f"{self.name}, experts" if self.moe else self.name

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that a trained mixer depends on."""
        settings = dataclasses.asdict(self.config)
        for name in self.mixer.speed_settings:
            settings.pop(name, None)
        return {"mixer": self.mixer.__name__, **settings}


def block_specs(config: ModelConfig, where: str = "config") -> list[BlockSpec]:
    """The blocks of a model, first to last, every setting checked. Raises ConfigError."""
    known = registry()
    kinds: dict[str, type[Mixer]] = dict(known)
    settings: dict[str, dict[str, Any]] = {}
    for name, values in config.mixers.items():
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: model.mixers.{name} is {values!r}, expected a mapping")
        values = dict(values)
        kind = values.pop("kind", name)
        if not isinstance(kind, str) or kind not in known:
            raise ConfigError(
                f"{where}: model.mixers.{name}: unknown mixer '{kind}'"
                f"{nearest(str(kind), list(known))}; known: {', '.join(known)}"
            )
        kinds[name], settings[name] = known[kind], values
    try:
        names = parse_pattern(config.pattern, kinds)
    except ValueError as error:
        raise ConfigError(f"{where}: model.{error}") from None
    specs = {}
    for name in dict.fromkeys([*names, *settings]):
        place = f"{where}: model.mixers.{name}"
        mixer_config: Any = build_config(kinds[name].config_class, settings.get(name, {}), place)
        if name in names:
            try:
                kinds[name].check(mixer_config, config.hidden_size)
            except ValueError as error:
                raise ConfigError(f"{place}: {error}") from None
        specs[name] = BlockSpec(name, kinds[name], mixer_config)
    if config.recursion is not None:
        _check_recursion(config.recursion, len(names), f"{where}: model.recursion")
    dense = len(names) if config.moe is None else config.moe.first_dense
    return [
        dataclasses.replace(specs[name], moe=config.moe if index >= dense else None)
        for index, name in enumerate(names)
    ]


def _check_recursion(recursion: RecursionConfig, num_blocks: int, where: str) -> None:
    if recursion.prelude + recursion.coda >= num_blocks:
        raise ConfigError(
            f"{where}: prelude {recursion.prelude} and coda {recursion.coda} leave nothing to loop "
            f"over of the pattern's {num_blocks} blocks"
        )
    if recursion.state_init != "input" and not recursion.adapter:
        raise ConfigError(
            f"{where}.state_init is {recursion.state_init}, which needs adapter=true: the loop "
            "would never see its input"
        )
    if recursion.sampling != "fixed":
        for name, value in (
            ("lora_rank", recursion.lora_rank > 0),
            ("step_signal", recursion.step_signal == "learned"),
            ("halting", recursion.halting),
        ):
            if value:
                raise ConfigError(
                    f"{where}.{name} needs a fixed number of passes, found sampling "
                    f"{recursion.sampling}"
                )
    if recursion.halting and recursion.backprop_last is not None:
        raise ConfigError(
            f"{where}.backprop_last is {recursion.backprop_last}; with halting every pass is part "
            "of the output, expected null"
        )


def check_tensor_parallel(config: ModelConfig, size: int, where: str) -> None:
    """Raise ConfigError unless ``size`` tensor-parallel processes can share the model."""
    counts: dict[str, int] = {}
    for spec in block_specs(config, where):
        for name, count in spec.mixer.divided(spec.config, config.hidden_size).items():
            if count > 1 or name not in SHAREABLE:
                counts[f"model.mixers.{spec.name}: {name}"] = count
    if config.moe is not None and config.moe.shared_intermediate_size:
        counts["model.moe: shared inner channels"] = config.moe.shared_intermediate_size
    if config.mlp.kind != "none" and (config.moe is None or config.moe.first_dense):
        counts["model.mlp: inner channels"] = config.mlp.width(config.hidden_size)
    if config.vocab_size is not None:
        counts["model.vocab_size"] = config.vocab_size
    for name, count in counts.items():
        if count % size:
            common = math.gcd(*counts.values())
            fitting = [str(n) for n in range(1, common + 1) if common % n == 0]
            raise ConfigError(
                f"{where}: parallel.tensor is {size}, which does not divide {count} ({name}); this "
                f"model fits {', '.join(fitting)}"
            )


def passes(config: ModelConfig) -> list[int]:
    """How often each block of the pattern is gone through (the mean, where it is sampled)."""
    num_blocks, recursion = len(block_specs(config)), config.recursion
    if recursion is None:
        return [1] * num_blocks
    looped = num_blocks - recursion.prelude - recursion.coda
    return [1] * recursion.prelude + [recursion.times] * looped + [1] * recursion.coda


def block_parameters(config: ModelConfig, spec: BlockSpec) -> int:
    """Of one block: mixer, MLP and norms; low-rank differences of a loop left out."""
    d = config.hidden_size
    norms = d * (1 if config.mlp.kind == "none" else 2) * (1 + (config.block_norm == "sandwich"))
    mlp = mlp_parameters(config.mlp.kind, d, config.mlp.width(d))
    if spec.moe is not None:
        mlp = MoE.num_parameters(spec.moe, d)
    return spec.mixer.num_parameters(spec.config, d) + mlp + norms


def block_flops(config: ModelConfig, spec: BlockSpec, seq_len: int) -> int:
    """Matrix-multiply FLOPs of one token's forward pass through one block."""
    d = config.hidden_size
    mlp = 2 * mlp_parameters(config.mlp.kind, d, config.mlp.width(d))
    if spec.moe is not None:
        mlp = MoE.flops_per_token(spec.moe, d)
    return spec.mixer.flops_per_token(spec.config, d, seq_len) + mlp


def training_flops_by_block(config: ModelConfig, seq_len: int) -> list[float]:
    """Forward and backward FLOPs per token of every block of the pattern, loops gone through, the
    head and what a loop has beside its blocks left out."""
    recursion = config.recursion
    flops = []
    for spec, times in zip(block_specs(config), passes(config), strict=True):
        through = times
        if times > 1 and recursion is not None and recursion.backprop_last is not None:
            through = min(times, recursion.backprop_last)
        flops.append(block_flops(config, spec, seq_len) * (times + 2.0 * through))
    return flops


def lora_parameters(config: ModelConfig, specs: list[BlockSpec]) -> int:
    """Parameters of one pass's low-rank differences: rank (d_in + d_out) for every linear layer of
    the loop. The layers' shapes are read off blocks that are built without memory."""
    recursion = config.recursion
    if recursion is None or recursion.lora_rank == 0:
        return 0
    import torch

    from pretrain.model.build import parallel_context
    from pretrain.model.depth_lora import linear_shapes
    from pretrain.model.language_model import Block
    from pretrain.parallel.processes import start_processes

    start_processes()
    total = 0
    with torch.device("meta"):
        context = parallel_context(torch.float32)
        layer = LayerContext(config.hidden_size, 0.0, 0.0, context)
        for spec in specs[recursion.prelude : len(specs) - recursion.coda]:
            shapes = linear_shapes(Block(spec, config, layer), context.tensor_size)
            total += sum(map(sum, shapes))
    return recursion.lora_rank * total


def recomputed_flops(config: ModelConfig, seq_len: int) -> tuple[int, int]:
    """Forward FLOPs per token that ``activation_checkpointing: block`` does once more: outside a
    loop, and of one pass through it."""
    flops = [block_flops(config, spec, seq_len) for spec in block_specs(config)]
    if config.recursion is None:
        return sum(flops), 0
    inside = slice(config.recursion.prelude, len(flops) - config.recursion.coda)
    return sum(flops) - sum(flops[inside]), sum(flops[inside])


@dataclass(frozen=True)
class ModelCounts:
    """parameters; forward matrix-multiply FLOPs per token; of them those of one pass through the
    loop of a recursive model; recurrent or cached state in bytes; recomputed: see
    :func:`recomputed_flops`."""

    parameters: int
    embedding_parameters: int
    flops_per_token: int
    state_bytes: int
    loop_flops: int = 0
    times: int = 1
    backprop_last: int | None = None
    recomputed: tuple[int, int] = (0, 0)

    def training_flops(self, times: float | None = None) -> float:
        """Forward and backward FLOPs per token, with ``times`` passes through the loop instead of
        the configured ones. Backward is twice forward, over the passes that gradients go through.
        """
        times = self.times if times is None else times
        through = times if self.backprop_last is None else min(times, self.backprop_last)
        outside = self.flops_per_token - self.times * self.loop_flops
        return 3 * outside + self.loop_flops * (times + 2 * through)

    def hardware_flops(self, times: float | None = None) -> float:
        """:meth:`training_flops` and what activation checkpointing of blocks computes again."""
        passes = self.times if times is None else times
        through = passes if self.backprop_last is None else min(passes, self.backprop_last)
        outside, inside = self.recomputed
        return self.training_flops(times) + outside + through * inside


def count_model(config: ModelConfig, vocab_size: int, seq_len: int) -> ModelCounts:
    """Count a model from its settings alone, for sequences of ``seq_len`` tokens."""
    d, specs, recursion = config.hidden_size, block_specs(config), config.recursion
    embedding = vocab_size * d * (1 if config.tie_embeddings else 2)
    parameters = embedding + d + sum(block_parameters(config, spec) for spec in specs)
    flops = [block_flops(config, spec, seq_len) for spec in specs]
    states = [s.mixer.state_bytes(s.config, d, seq_len) for s in specs]
    repeats, loop_flops, total = passes(config), 0, sum(flops)
    if recursion is not None:
        adapter = 2 * d * d * recursion.adapter
        lora = lora_parameters(config, specs)
        learned = recursion.times * d * (recursion.step_signal == "learned")
        parameters += adapter + recursion.times * lora + learned + (d + 1) * recursion.halting
        inside = slice(recursion.prelude, len(specs) - recursion.coda)
        loop_flops = sum(flops[inside]) + 2 * (adapter + lora + d * recursion.halting)
        total += recursion.times * loop_flops - sum(flops[inside])
    return ModelCounts(
        parameters=parameters,
        embedding_parameters=embedding,
        flops_per_token=2 * vocab_size * d + total,
        state_bytes=sum(n * b for n, b in zip(repeats, states, strict=True)),
        loop_flops=loop_flops,
        times=1 if recursion is None else recursion.times,
        backprop_last=None if recursion is None else recursion.backprop_last,
        recomputed=recomputed_flops(config, seq_len),
    )
