"""The dtypes of weights and activations by the names that settings give precisions."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
