"""``python -m pretrain.nn.mixers > docs/layers.md``: the page on layers, from the registry."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pretrain.nn.mixers import registry

HIDDEN, SEQ_LEN = 2048, 4096

HEAD = """# Layers

Every sequence mixer is one file in `pretrain/nn/mixers/`, named in a model's pattern
(`6*(3*gdn attn)`); a variant with settings of its own gets a name through
`mixers: {mine: {kind: gdn, num_heads: 4}}`. Settings are the fields of the mixer's config class.

The table is made from the registry by `python -m pretrain.nn.mixers > docs/layers.md`. Numbers
are for each mixer's default settings, whose sizes follow the width (see [settings](settings.md)),
at hidden size %(hidden)d and %(seq)d tokens: parameters in units of hidden size squared,
forward MFLOP per token (matrix products; backward is twice that), state in KiB at the sequence's
end, activations in bfloat16 and recurrent states in float32. H heads, K key and V value channels of
a head, D channels of a head, T tokens.

| name | layer | equation | state | KiB | params / d² | MFLOP | over time | parallel | source |
|---|---|---|---|---:|---:|---:|---|---|---|
"""

FOOT = """
All of them call the plain functions of `pretrain.ops`. Each has a definition (a loop over
time, `backend="recurrent"` or `"sequential"`) and a faster form, equal to 1e-10 in float64 with all
gradients; `with pretrain.ops.definitions():` makes a full model run by the definitions, to find
out whether a fast form is to blame for a result. Documents packed in a row are passed as
`sequences=`: a `pretrain.data.sequences.Sequences`, made once per batch, which keeps what the
functions derive from it, or the tensor of their ends.

**Parallelism.** All run under data parallel with a sharded optimizer (ZeRO-1), and under tensor
parallelism with or without sequence parallelism (`parallel: {tensor: 2, sequence: true}`):
projections are sharded by column, outputs by row, heads over the ranks; shared query and key heads
are replicated, norms over the full width all-reduce their squares. Three optimizer steps on two
processes equal those on one to 1e-5, for every mixer and every kind of loop
(`tests/pretrain/parallel/test_tensor_parallel.py`).

**Layers without an MLP.** The blocks of `mamba` and `mamba2` are a model's only layers where it is
made of them alone: `pattern: "48*mamba"` and `mlp: {kind: none}`, with twice the blocks of a
transformer. `mlp` is one for all blocks, so a hybrid with attention has MLPs behind its `mamba`
blocks too, or nowhere. Under tensor parallelism `mamba` all-reduces dt_rank + 2 N numbers of each
token once more than other layers, in both passes: steps, B and C are made of all channels.

**Scans.** `hgrn` and `quasi_lstm` are diagonal: chunks of a sequence are scanned side by side, and
the backward pass is one scan in reverse. `hgrn` shares its lower bounds over depth, as in the paper
(`lower_bound: own`: bounds of each layer), may have short convolutions (`conv_size: 4`), and with
`complex_state: true` states that turn from token to token, as the paper's do;
`quasi_lstm` is made for a stream of text: `train: {carry_state: true, seq_len: 512}`.

**Diagonal plus low rank.** `rwkv7`, `gdn2` and `comba` erase by a key of their own, and are what
`pretrain.ops.dplr` computes: `S_t = Diag(a_t) S_{t-1} + p_t^T (e_t S_{t-1}) + k_t^T v_t`.
`rwkv7` is RWKV-7's time mixing with its published start. The first `rwkv7` block of a model hands
its values on to all later ones (`value_residual`), through pipelines too. Its output projection
starts at 0 unless `zero_output: false`.

**MLPs that see the token before.** `mlp: {kind: rwkv, ratio: 4}` is RWKV-7's channel mixing, behind
layers of any kind: `W_down relu(W_up (x + mu (x' - x)))^2`, where x' is the input at the token
before, 0 at a document's first. `pattern: "12*rwkv7"` with it and `norm: layer` are RWKV-7's
blocks. That input is part of a block's state, beside its mixer's, so generation, exports, segments,
carried rows and early exits have it. The output projection starts at 0, as published.

**Softmaxes over the past.** `lightnet` and `aaren` never forget by a gate: a token weighs
`exp(x_t - z_t)` with `z_t` the log-sum-exp of the logits so far, and what came before is scaled
down by `exp(z_{t-1} - z_t)`. `pretrain.ops.log_sum_exp_gate` makes both from `x_t - z_{t-1}`, which
stays exact in float32 where z hardly moves from token to token; z is part of the state.

**MesaNet.** `mesa` solves a system for every token by `iterations` (30) steps of conjugate
gradients, each of the cost of a linear attention; the backward pass solves once more and keeps
nothing of them. As many iterations as a key has channels are exact; on random keys 8 come within
1e-3 of that.

**A prefix.** `jrt` with `prefix_length: E` lets all positions of a document, and of a prompt, see
its first E tokens. A next-token loss would learn to copy them, so training takes
[`data.prefix`](training.md#prefixes): hidden tokens of prefixes are predicted, and the tokens after
them. A shorter prompt is all prefix. With E = 0, the default, it is normalised linear attention by
the Taylor feature map, and trains as any.

**Sequential layers.** `m2rnn`, `lstm`, `gru`, `slstm` and `elman` step through time. In plain torch
their backward pass is linear in T and keeps every c-th state, c about sqrt(T / 4) up to 32,
recomputing the rest. `state_grad_clip` bounds the gradient that is carried from step to step.

**Newton layers.** `para_gru` and `para_lstm` step through segments of some 32 to 64 tokens side by
side, and Newton's method (usually 3 iterations) finds where each segment starts, until no start
would move by more than `tolerance`: what the metrics call the residual. A sequence that has not
converged after `iterations` is computed step by step instead; the metrics report
`newton_residual_max`, `newton_iterations_max` and `newton_fallbacks`. Recurrent weights stay within
`max_recurrent` (0.5), which keeps that rare. Where thousands of channels run side by side anyway
on a GPU, stepping from end to end is less work, and is done instead: the three metrics are then 0.

**On a GPU** (`pip install -e ".[cuda]"`, or the Dockerfile's) every op takes the fastest
implementation that is right for the device and dtype; a line at the start of the log names them,
and `backend=` of each function of `pretrain.ops` chooses by hand.

* attention, sliding windows: flash-attn 3 on Hopper or 2, where installed; else torch's own kernel
  for sequences of different lengths
* diagonal scans: plain torch, whose steps grow with sqrt T; flash-linear-attention's kernel, which
  steps from token to token, by `backend="fla"`
* linear attention, delta rules, DeltaProduct, Gated DeltaNet-2, Comba, RWKV-7, MesaNet, short
  convolution: flash-linear-attention
* M2RNN: our Triton kernels, the state on chip and kept every 64th token
* ParaGRU, ParaLSTM: our Triton kernels, by segments with all Newton iterations in one or by plain
  steps; backward by segments
* lstm, gru, slstm, elman of up to 128 channels a head: our Triton kernels, a head's recurrent
  matrices on chip
* head and cross entropy, where the vocabulary is not sharded: Liger's kernel between the products,
  some thousand tokens at a time
* gates with the norms before them, L2 norms, SwiGLU: fused by torch.compile

Documents, starting states and gradients are as in the definitions; our kernels use no atomics, so
equal inputs give equal bits. `tests/pretrain/ops/test_kernels.py` and `test_fla.py` run them in
Triton's interpreter without a GPU, and on one where there is one; `benchmarks/ops_gpu.py` and
`train_gpu.py` measure them (`benchmarks/results/gpu.md` says what has been measured).

## Your own cell

Any elementwise cell, parallel over time, its Jacobian by `torch.func`:

```python
import torch
from pretrain.ops import NewtonReport, newton_recurrence


def cell(h, x, parameters):
    \"\"\"h [1, ..., D], x [2, ..., D], parameters [2, D]: a leaky tanh unit with a gate.\"\"\"
    weight, bias = parameters
    gate = torch.sigmoid(bias + x[0])
    return gate * h + (1 - gate) * torch.tanh(weight * h + x[1])


x = torch.randn(4, 1000, 2, 64, requires_grad=True)  # [B, T, inputs, D]
parameters = (0.5 * torch.randn(2, 64)).requires_grad_()
report = NewtonReport()
states, last = newton_recurrence(cell, x, parameters, report=report)  # [B, T, 1, D], [B, 1, D]
states.square().sum().backward()
print(report)  # residual, fallbacks
```

With `num_states=2` the cell sees and returns `[2, ..., D]`, and its 2 x 2 Jacobians are used.

A recurrence `y_t = a_t y_{t-1} + x_t` needs no Newton's method: `y, last = diagonal_scan(a, x)`,
for a and x `[B, T, D]`, real or complex; `diagonal_scan(None, x, log_decay=g)` takes a's logarithm.

## Recursion over depth

`model.recursion` makes a loop of the pattern's blocks between `prelude` and `coda`, over any
mixers:

```yaml
model:
  pattern: "2*attn 4*gdn 2*attn"
  recursion: {prelude: 2, coda: 2, times: 8}                     # tied weights
  # recursion: {prelude: 2, coda: 2, times: 3, lora_rank: 64}    # with low-rank differences
  # recursion: {prelude: 2, coda: 2, times: 32, sampling: poisson, backprop_last: 8, adapter: true,
  #             state_init: random, normalize_state: true}       # recurrent depth
  # recursion: {times: 6, step_signal: coordinate, halting: true,
  #             halting_state: copy}                             # Universal Transformer
  # recursion: {times: 4, residual_scales: true}                 # learned residual scalars
```

`block_norm: sandwich` and `scale_embeddings: true` belong to the recurrent-depth recipe.
`initialize: {checkpoint: runs/dense, method: stepwise, lora: svd}` starts from a trained model.
`python -m evals runs/NAME --recurrences 64` scores with another number of passes, and `--exit` lets
each token leave by itself ([exits](exits.md)).
[Depth](depth.md) shows how models with recurrent depth write several tokens at once, and has the
recipe of the Universal Transformer.
"""


def page() -> str:
    """Return the page as Markdown."""
    rows = []
    for name, mixer in sorted(registry().items()):
        config, card = mixer.config_class().resolve(HIDDEN), mixer.card
        mixer.check(config, HIDDEN)
        flops = mixer.flops_per_token(config, HIDDEN, SEQ_LEN)
        parameters = mixer.num_parameters(config, HIDDEN)
        state = mixer.state_bytes(config, HIDDEN, SEQ_LEN) / 1024
        cells = (
            f"`{name}`",
            card.name,
            f"`{card.equation}`",
            card.state,
            f"{state:,.0f}",
            f"{parameters / HIDDEN**2:.2f}",
            f"{flops / 1e6:.1f}",
            card.over_time,
            f"data, tensor by {card.sharded}",
            card.source,
        )
        rows.append("| " + " | ".join(cells) + " |\n")
    return HEAD % {"hidden": HIDDEN, "seq": SEQ_LEN} + "".join(rows) + FOOT


def main(arguments: Sequence[str] = ()) -> int:
    """Print the page; return the exit status."""
    argparse.ArgumentParser(
        prog="python -m pretrain layers", description="Print the table of all layers."
    ).parse_args(arguments)
    print(page(), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
