"""Prefixes and the loss of their hidden tokens: every layout trains as one process does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers import prefix_worker
from tests.helpers.prefix_worker import ALONE, GRADIENTS, STEPS, gradients, rows, steps
from tests.helpers.processes import run_on
from tests.helpers.relative_error import relative_error

pytestmark = pytest.mark.usefixtures("processes")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("prefixes") / "found.pt"
    run_on(2, prefix_worker.__name__, path)
    found: dict[str, Any] = torch.load(path)
    return found


def test_the_loss_is_that_of_next_tokens_and_a_share_of_hidden_ones():
    """Written out: of each sample the mean of hidden tokens, by its share of next ones."""
    sums, found = gradients(ALONE)
    engine = prefix_worker.engine_of(ALONE, torch.float64)
    model: Any = engine.parts[0]
    expected, parts = torch.zeros(4, dtype=torch.float64), []
    for batch in rows(0):
        losses = model(batch.tokens, batch.targets, sequences=batch.sequences)
        assert batch.masked is not None
        hidden = batch.masked > 0
        share = 0.25 * float(batch.loss_mask.sum()) * losses[hidden].mean()
        parts.append((losses * batch.loss_mask).sum() + share)
        nats = (losses * batch.loss_mask).sum(), losses[hidden].sum()
        expected += torch.stack([nats[0], batch.loss_mask.sum(), nats[1], hidden.sum()]).detach()
    assert torch.allclose(sums, expected, rtol=1e-12)
    total = torch.stack(parts).sum() / expected[1]
    named = dict(model.named_parameters())
    for name, gradient in zip(named, torch.autograd.grad(total, list(named.values())), strict=True):
        assert relative_error(found[name], gradient) < 1e-6, name


@pytest.mark.slow
def test_every_layout_equals_one_process(two_processes):
    sums, expected = gradients(ALONE)
    for layout, parallel in GRADIENTS.items():
        processes = two_processes[layout]
        total = sum(found for found, _ in processes) / parallel.tensor
        assert torch.allclose(total, sums, rtol=1e-12), layout
        for name, gradient in expected.items():
            parts = [found[name] for _, found in processes if name in found]
            axes = [i for i, size in enumerate(gradient.shape) if parts[0].shape[i] != size]
            whole = torch.cat(parts, axes[0]) if axes else parts[0]
            assert relative_error(whole, gradient) < 1e-6, (layout, name)


@pytest.mark.slow
def test_sharded_optimizers_take_the_same_steps(two_processes):
    expected = steps(ALONE)
    assert all(result.masked_loss is not None for result in expected)
    for layout in STEPS:
        for found, result in zip(two_processes[layout], expected, strict=True):
            for name in ("loss", "grad_norm", "masked_loss"):
                assert found[name] == pytest.approx(getattr(result, name), rel=1e-5), layout
