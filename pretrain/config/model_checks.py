"""Checks across the settings of a model alone, which exported models make too."""

from __future__ import annotations

from pretrain.common.config_loader import ConfigError, check_of
from pretrain.config.model import ModelConfig, MoEConfig, RecursionConfig


@check_of(MoEConfig)
def _check_top_k(moe: MoEConfig, where: str, section: str) -> None:
    if moe.top_k > moe.num_experts:
        raise ConfigError(
            f"{where}: {section}top_k is {moe.top_k}, expected at most its num_experts = "
            f"{moe.num_experts}"
        )
    if moe.shared_gate and not moe.shared_intermediate_size:
        raise ConfigError(
            f"{where}: {section}shared_gate is true, but {section}shared_intermediate_size is 0; "
            "expected the inner channels of the expert that it gates"
        )


@check_of(ModelConfig)
def _check_mlp(model: ModelConfig, where: str, section: str) -> None:
    if model.moe is not None and model.mlp.kind == "none":
        raise ConfigError(
            f"{where}: {section}moe takes the place of MLPs, but {section}mlp.kind is none; "
            "expected swiglu, gelu, relu or rwkv"
        )


@check_of(RecursionConfig)
def _check_recursion(recursion: RecursionConfig, where: str, section: str) -> None:
    if recursion.state_init != "input" and not recursion.adapter:
        raise ConfigError(
            f"{where}: {section}state_init is {recursion.state_init}, which needs adapter=true: "
            "the loop would never see its input"
        )
    if recursion.sampling != "fixed":
        for name, value in (
            ("lora_rank", recursion.lora_rank > 0),
            ("step_signal", recursion.step_signal == "learned"),
            ("halting", recursion.halting),
        ):
            if value:
                raise ConfigError(
                    f"{where}: {section}{name} needs a fixed number of passes, found sampling "
                    f"{recursion.sampling}"
                )
    if recursion.halting_state != "carry" and not recursion.halting:
        raise ConfigError(
            f"{where}: {section}halting_state is {recursion.halting_state}, but no token halts; "
            "expected halting=true, or carry"
        )
    if recursion.position_offsets and recursion.step_signal != "coordinate":
        raise ConfigError(
            f"{where}: {section}position_offsets is {recursion.position_offsets}, but step_signal "
            f"{recursion.step_signal} has no positions; expected coordinate, or 0"
        )
    if recursion.exit_distill and recursion.exit_weight == 0:
        raise ConfigError(
            f"{where}: {section}exit_distill is true, but {section}exit_weight is 0, expected it "
            "above 0"
        )
    if recursion.exit_weight > 0 and recursion.halting:
        raise ConfigError(
            f"{where}: {section}exit_weight is {recursion.exit_weight} with halting, whose output "
            "is a mean over the passes; expected exit_weight 0"
        )
    if recursion.halting and recursion.backprop_last is not None:
        raise ConfigError(
            f"{where}: {section}backprop_last is {recursion.backprop_last}; with halting every "
            "pass is part of the output, expected null"
        )


def check_loop(recursion: RecursionConfig, num_blocks: int, where: str, section: str) -> None:
    """Raise ConfigError unless a pattern of ``num_blocks`` leaves blocks to loop over."""
    if recursion.prelude + recursion.coda >= num_blocks:
        raise ConfigError(
            f"{where}: {section}recursion: prelude {recursion.prelude} and coda {recursion.coda} "
            f"leave nothing to loop over of the pattern's {num_blocks} blocks"
        )


def check_stages(most: int, why: str, count: int, where: str) -> None:
    """Raise ConfigError unless the model can be cut into ``count`` pipeline stages."""
    if count > most:
        raise ConfigError(
            f"{where}: parallel.pipeline x parallel.virtual_pipeline is {count} stages, but "
            f"{why} and a head; expected at most {most}"
        )
