"""Which ops ``auto`` leaves to flash-linear-attention, by the card and by Triton's version."""

from __future__ import annotations

import pytest
import torch

from pretrain.ops import comba, delta_rule, dplr, gdn2, linear_attention, mesa, short_convolution
from pretrain.ops.backends import describe_backends
from pretrain.ops.delta_rule import dispatch as of_delta_rule
from pretrain.ops.dplr import dispatch as of_dplr
from pretrain.ops.linear_attention import dispatch as of_linear_attention
from pretrain.ops.mesa import dispatch as of_mesa
from pretrain.ops.shared import flash_linear_attention
from pretrain.ops.short_convolution import dispatch as of_short_convolution

T, HEADS, DIM = 3, 1, 8


class TakenError(Exception):
    """What stands for fla raises: it was chosen."""


@pytest.fixture
def card(monkeypatch):
    """Return a function that makes this machine one with fla, a card and a version of Triton."""

    def taken(*_, **__):
        raise TakenError

    def pretend(capability: tuple[int, int], triton: str) -> None:
        versions = {"flash-linear-attention": "0.6.0", "triton": triton}
        flash_linear_attention._usable.cache_clear()
        monkeypatch.setattr(flash_linear_attention, "device_type", lambda x: "cuda")
        monkeypatch.setattr(flash_linear_attention, "_found", lambda: True)
        monkeypatch.setattr(
            flash_linear_attention.importlib.metadata,
            "version",
            lambda package: versions.get(package, "0"),
        )
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    monkeypatch.setattr(of_delta_rule, "fla_delta_rule", taken)
    for name in ("fla_dplr", "fla_gdn2", "fla_comba"):
        monkeypatch.setattr(of_dplr, name, taken)
    monkeypatch.setattr(of_linear_attention, "fla_linear_attention", taken)
    monkeypatch.setattr(of_mesa, "fla_mesa", taken)
    monkeypatch.setattr(of_short_convolution, "fla_short_convolution", taken)
    yield pretend
    flash_linear_attention._usable.cache_clear()


def values(steps=1):
    return torch.randn(1, steps * T, HEADS, DIM, dtype=torch.bfloat16)


def decay(axes):
    return None if axes is None else -torch.rand((1, T, HEADS, DIM)[:axes])


def rule(axes, steps=1):
    beta = torch.rand(1, steps * T, HEADS, dtype=torch.bfloat16)
    return lambda: delta_rule(
        values(), values(steps), values(steps), beta, log_decay=decay(axes), num_householder=steps
    )


def read(axes):
    return lambda: linear_attention(values(), values(), values(), log_decay=decay(axes))


def low_rank(op):
    x = values()
    others = {dplr: (x, x), gdn2: (x, x), comba: (x, x[..., 0])}[op]
    return lambda: op(x, x, x, *others, log_decay=decay(3 if op is comba else 4))


def regression():
    gates = torch.rand(2, 1, T, HEADS)
    return mesa(values(), values(), values(), gates[0], torch.ones(HEADS, DIM), log_decay=-gates[1])


def convolution():
    return short_convolution(torch.randn(1, T, DIM, dtype=torch.bfloat16), torch.randn(DIM, 4))


def is_taken(run) -> bool:
    try:
        run()
    except TakenError:
        return True
    return False


OPS = {
    "convolution": (convolution, True),
    "DeltaNet": (rule(None), True),
    "Gated DeltaNet": (rule(3), False),
    "Kimi delta attention": (rule(4), True),
    "DeltaProduct": (rule(None, steps=2), False),
    "Gated DeltaProduct": (rule(3, steps=2), False),
    "DPLR": (low_rank(dplr), True),
    "Gated DeltaNet-2": (low_rank(gdn2), True),
    "Comba": (low_rank(comba), False),
    "MesaNet": (regression, False),
    "linear attention": (read(None), True),
    "Mamba-2": (read(3), False),
    "GLA": (read(4), True),
}


@pytest.mark.parametrize("name", OPS)
def test_on_hopper_an_old_triton_costs_fla_only_what_it_compiles_wrong(card, name):
    run, with_old_triton = OPS[name]
    card((9, 0), "3.6.0")
    assert is_taken(run) == with_old_triton
    card((9, 0), "3.7.1")
    assert is_taken(run)
    card((8, 0), "3.6.0")
    assert is_taken(run)
    card((9, 0), "3.5.1")
    assert not is_taken(run)


def test_the_log_says_what_an_old_triton_costs(card, monkeypatch):
    card((9, 0), "3.6.0")
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *sizes, dtype, device: empty(*sizes, dtype=dtype))
    found = describe_backends()
    assert "flash-linear-attention 0.6.0 (with a decay per head chunked torch" in found
    assert "triton 3.6.0 is below 3.7.1" in found
