"""A few steps of the small hybrid: by the engine, and by a loop with nothing but torch."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from pretrain.checkpoint.state import CheckpointState
from pretrain.config import OptimizerConfig
from pretrain.data.batches import pack_rows
from pretrain.model.build import build_model
from pretrain.nn.parameters import info_of
from pretrain.training.engine import Engine
from tests.helpers.small_model import VOCAB, settings

OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.2, clip_grad=0.5)


STEPS = 3


def batches(step, rows=4, micro_batch_size=2, length=32):
    generator = np.random.default_rng(step)
    tokens = generator.integers(0, VOCAB, (rows, length + 1))
    return [
        pack_rows(tokens[i : i + micro_batch_size], eod_id=7)
        for i in range(0, rows, micro_batch_size)
    ]


def plain_loop(model, micro_batch_size=2):
    """Losses and gradient norms of a loop with nothing but torch."""
    groups = [
        {"params": [p for p in model.parameters() if info_of(p).weight_decay], "weight_decay": 0.2},
        {
            "params": [p for p in model.parameters() if not info_of(p).weight_decay],
            "weight_decay": 0.0,
        },
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    results = []
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = batches(step, micro_batch_size=micro_batch_size)
        count = sum(int(b.loss_mask.sum()) for b in parts)
        total = 0.0
        for b in parts:
            loss = (model(b.tokens, b.targets, cu_seqlens=b.cu_seqlens) * b.loss_mask).sum()
            (loss / count).backward()
            total += loss.item() / count
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        results.append((total, float(norm)))
    return results


def engine_loop(model, micro_batch_size=2):
    engine = Engine(model, OPTIMIZER)
    results = [
        engine.train_step(batches(step, micro_batch_size=micro_batch_size), 1e-3)
        for step in range(STEPS)
    ]
    return [(r.loss, r.grad_norm) for r in results]


def make(dtype=torch.float32):
    return build_model(settings(init_std=0.05), VOCAB, seed=0, dtype=dtype)


STATE = CheckpointState(
    step=2,
    tokens=256,
    seed=0,
    skipped=0,
    vocab_size=VOCAB,
    precision="float32",
    tokenizer_sha256="0" * 64,
    data=["x"],
    model=dataclasses.asdict(settings()),
)
