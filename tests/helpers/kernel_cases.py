"""Random inputs for the Triton kernels, and their comparison with an op's definition: in the
interpreter in float64, on a GPU, where there is one, in float32."""

from __future__ import annotations

import torch

from pretrain.ops import m2rnn, para_gru, para_lstm, rnn
from tests.helpers.relative_error import relative_error

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.float32) if ON_GPU else ("cpu", torch.float64)
TOLERANCE = 1e-4 if ON_GPU else 1e-10
DEFINITION = {m2rnn: "recurrent", rnn: "recurrent", para_gru: "sequential", para_lstm: "sequential"}


def normal(*shape, scale=1.0):
    return (scale * torch.randn(shape, dtype=DTYPE, device=DEVICE)).requires_grad_()


def packed(draw, longest, count=4):
    """Lengths, among them 0 and 1, and where they begin."""
    lengths = [draw.randint(0, longest) for _ in range(draw.randint(1, count))]
    lengths.insert(draw.randint(0, len(lengths)), draw.choice((0, 1)))
    return lengths, torch.tensor([0, *lengths], device=DEVICE).cumsum(0)


def compare(op, run, wanted, tolerance=TOLERANCE, fast="triton"):
    """run(backend) gives the output and the final states; all of them, and all gradients."""
    results = []
    for backend in (DEFINITION[op], fast):
        output, *states = run(backend)
        generator = torch.Generator(DEVICE).manual_seed(1)
        loss = torch.zeros((), dtype=DTYPE, device=DEVICE)
        for tensor in (output, *states):
            weights = torch.randn(tensor.shape, generator=generator, dtype=DTYPE, device=DEVICE)
            loss = loss + (tensor.masked_fill(tensor.isinf(), 0) * weights).sum()
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        results.append([output, *states, *gradients])
    for expected, found in zip(*results, strict=True):
        assert relative_error(found, expected) < tolerance
