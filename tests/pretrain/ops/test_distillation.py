"""The divergence from a teacher, in pieces, against torch's own functions in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pretrain.data.teacher_top import TeacherTop
from pretrain.ops.cross_entropy.distillation import TeacherRows, distillation_losses

TOKENS, DIM, ROWS = 13, 5, 24


def drawn(seed, *shape, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double() * scale


def models(seed):
    """x, weight and targets of a student, and a teacher of another width."""
    x, weight = drawn(seed, TOKENS, DIM), drawn(seed + 1, ROWS, DIM)
    teacher = TeacherRows(drawn(seed + 2, TOKENS, 7), drawn(seed + 3, ROWS, 7), 5.0)
    targets = torch.arange(TOKENS) % ROWS
    return x.requires_grad_(), weight.requires_grad_(), targets, teacher


def teacher_logits(teacher, vocabulary, temperature):
    logits = teacher.x @ teacher.weight.t()
    if teacher.softcap is not None:
        logits = teacher.softcap * torch.tanh(logits / teacher.softcap)
    return logits[:, :vocabulary] / temperature


def kl(log_p, log_q):
    """Of all events that either distribution has."""
    return torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0).sum(-1)


def plain(x, weight, targets, log_p, *, vocabulary, temperature, reverse, softcap, events=None):
    """Divergence and cross entropy of all logits at once; ``events`` makes those of log q."""
    logits = x @ weight.t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_q = (logits[:, :vocabulary] / temperature).log_softmax(-1)
    log_q = log_q if events is None else events(log_q)
    value = kl(log_q, log_p) if reverse else kl(log_p, log_q)
    return torch.stack(
        [value * temperature**2, nn.functional.cross_entropy(logits, targets, reduction="none")]
    )


def compare(found, wanted, x, weight, tolerance=1e-13):
    upstream = drawn(99, *found.shape)
    gradients = [torch.autograd.grad(y, (x, weight), upstream) for y in (found, wanted)]
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tokens_at_once", [1, 4, 100])
@pytest.mark.parametrize(
    ("vocabulary", "temperature", "softcap"), [(ROWS, 1.0, None), (19, 2.5, None), (21, 0.7, 3.0)]
)
def test_is_the_plain_divergence(vocabulary, temperature, softcap, tokens_at_once, reverse):
    x, weight, targets, teacher = models(vocabulary)
    options = {"vocabulary": vocabulary, "temperature": temperature, "reverse": reverse}
    found = distillation_losses(
        x, weight, targets, teacher, tokens_at_once=tokens_at_once, softcap=softcap, **options
    )
    log_p = teacher_logits(teacher, vocabulary, temperature).log_softmax(-1)
    compare(found, plain(x, weight, targets, log_p, softcap=softcap, **options), x, weight)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tokens_at_once", [3, 100])
@pytest.mark.parametrize("k", [1, 6, 19])
def test_the_likeliest_ids_and_one_event_of_all_others(k, tokens_at_once, reverse):
    x, weight, targets, teacher = models(k)
    options = {"vocabulary": 19, "temperature": 1.5, "reverse": reverse}
    full = teacher_logits(teacher, 19, 1.5).log_softmax(-1)
    log_probs, ids = full.topk(k, -1)
    rest = full.scatter(1, ids, -torch.inf).logsumexp(-1)
    top = TeacherTop(ids, log_probs, rest)
    found = distillation_losses(x, weight, targets, top, tokens_at_once=tokens_at_once, **options)

    def events(log_q):
        others = log_q.scatter(1, ids, -torch.inf) if k < 19 else None
        end = log_q.new_full((TOKENS, 1), -1e300) if others is None else others.logsumexp(-1)
        return torch.cat([log_q.gather(1, ids), end.view(-1, 1)], 1)

    log_p = torch.cat([log_probs, rest[:, None]], 1)
    if k == 19:
        log_p = log_p[:, :-1]
        wanted = plain(
            x, weight, targets, log_p, softcap=None, events=lambda q: events(q)[:, :-1], **options
        )
        in_process = distillation_losses(
            x, weight, targets, teacher, tokens_at_once=tokens_at_once, **options
        )
        torch.testing.assert_close(found, in_process, rtol=1e-13, atol=1e-13)
    else:
        wanted = plain(x, weight, targets, log_p, softcap=None, events=events, **options)
        whole = plain(x, weight, targets, full, softcap=None, **options)
        assert (found[0] <= whole[0] + 1e-12).all()  # of fewer events: a lower bound
        assert not torch.allclose(found[0], whole[0])
    compare(found, wanted, x, weight)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("tokens_at_once", "temperature"), [(3, 1.0), (100, 2.0)])
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(tokens_at_once, temperature, reverse):
    x, weight, targets, _ = models(5)
    x, weight = (t.detach().float().requires_grad_() for t in (x, weight))
    found = distillation_losses(
        x,
        weight,
        targets,
        TeacherRows(x.detach().clone(), weight.detach().clone()),
        tokens_at_once=tokens_at_once,
        vocabulary=20,
        temperature=temperature,
        reverse=reverse,
    )
    assert found[0].tolist() == [0.0] * TOKENS
    gradients = torch.autograd.grad(found[0].sum(), (x, weight))
    assert all(float(g.abs().max()) == 0 for g in gradients)


def test_the_z_loss_counts_in_the_gradient_alone():
    x, weight, targets, teacher = models(8)
    options: Any = {"tokens_at_once": 4, "vocabulary": 20}
    with_it = distillation_losses(x, weight, targets, teacher, z_loss_weight=0.1, **options)
    without = distillation_losses(x, weight, targets, teacher, **options)
    assert torch.equal(with_it, without)
    z_loss = 0.1 * (x @ weight.t()).logsumexp(-1).square()
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (with_it, without, z_loss)]
    torch.testing.assert_close(gradients[0], gradients[1] + 2 * gradients[2])


def test_shapes_that_do_not_fit():
    x, weight, targets, teacher = models(1)
    short = TeacherRows(teacher.x[:4], teacher.weight)
    with pytest.raises(ValueError, match="4 hidden rows and 24 of its head, expected 13 and 24"):
        distillation_losses(x, weight, targets, short, tokens_at_once=4, vocabulary=20)
    with pytest.raises(ValueError, match="temperature is 0, expected more than 0"):
        distillation_losses(
            x, weight, targets, teacher, tokens_at_once=4, vocabulary=20, temperature=0
        )
