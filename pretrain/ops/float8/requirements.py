"""The conditions under which a machine can multiply in float8."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from functools import cache
from typing import Any

import torch

from pretrain.common.errors import UserError

LEAST_CAPABILITY = (8, 9)  # of NVIDIA GPUs, Ada and Hopper on, with float8 tensor cores


def check_float8() -> None:
    """Raise UserError unless torchao is installed and this process's device can multiply."""
    if importlib.util.find_spec("torchao") is None:
        raise UserError(
            "train.precision is fp8, which needs torchao, which is not installed: "
            "pip install 'hybrid-pretrain[fp8]', or torchao itself"
        )
    if not torch.cuda.is_available():
        return  # emulated
    found = torch.cuda.get_device_capability()
    if found < LEAST_CAPABILITY:
        major, minor = LEAST_CAPABILITY
        raise UserError(
            f"train.precision is fp8, but {torch.cuda.get_device_name()} of compute capability "
            f"{found[0]}.{found[1]} has no float8 products; expected {major}.{minor} or more, or "
            "train.precision=bf16"
        )


@cache
def float8_tensors() -> Any:
    """Return torchao's module of float8 tensors, with their products registered.

    What it says while it is imported, of kernels for other things and other machines, is left out.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        importlib.import_module("torchao.float8.float8_ops")
        return importlib.import_module("torchao.float8.float8_training_tensor")
    finally:
        logging.disable(before)
