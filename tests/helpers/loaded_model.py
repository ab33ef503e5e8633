"""What a loaded checkpoint is to evaluations, around a small model that was not trained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from pretrain.config import DataConfig
from pretrain.data.tokenizer import Tokenizer
from pretrain.model.build import build_model
from tests.helpers.small_model import settings


def loaded(corpus, pattern="gdn attn", seq_len=16, **changes) -> Any:
    config = settings(pattern=pattern, **changes)
    model = build_model(config, 384, seed=0, dtype=torch.float64)
    run = SimpleNamespace(
        train=SimpleNamespace(seq_len=seq_len),
        model=config,
        data=DataConfig(str(corpus)),
    )
    state = SimpleNamespace(step=3, tokens=100)
    tokenizer = Tokenizer.load(corpus)
    return SimpleNamespace(
        model=model.eval(),
        reader=model,
        exits=None,
        candidates=tokenizer.vocab_size,
        tokenizer=tokenizer,
        opening_id=tokenizer.eod_id,
        opening="the end-of-document token",
        run=run,
        state=state,
        checkpoint="x",
    )
