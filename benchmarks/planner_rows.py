"""Published measurements of ``benchmarks/data/planner`` as runs and kernels that can be planned.

Every row becomes something to plan, or is left out with a reason. What a row does not say is taken
from its source (``_SOURCES``), never from the measured speed.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.planner_table import LeftOut, Row, table_rows
from pretrain.common.errors import ConfigError, UserError
from pretrain.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from pretrain.config.model import MLPConfig, MoEConfig
from pretrain.model.counts import count_model
from pretrain.model.spec import block_specs
from pretrain.planner.software import Software

DATA = Path(__file__).parent / "data" / "planner"

HARDWARE = {
    "A100-40GB": "a100-40gb",
    "A100-80GB": "a100-80gb",
    "A100": "a100-80gb",  # where it is not said
    "H100-SXM-80GB": "h100",
    "H100": "h100",
    "H800": "h100",  # one GPU of it
    "H100-96GB-HBM2e-500W": str(DATA / "h100-hbm2e.yaml"),
    "H200-SXM-141GB": "h200",
    "B200": "b200",
    "GB200": "b200",
}
_PER_NODE = {"kempner": 4}  # GPUs of a node, where not 8
_MIXERS = {"attn", "gdn", "deltanet", "retnet", "hgrn2", "linear_attn", "mamba2", "m2rnn"}
_MIXERS |= {"delta_product"}

# What is known of the programs that the rows were measured with; see README.md beside the data.
_SOURCES = {
    "mpt": Software(elementwise="eager", attention="flash1", logits_bytes=10.0),
    "titan": Software(logits_bytes=10.0, recomputed_products=0.5, state_bytes=16.0),
    "kempner": Software(logits_bytes=8.0, overlaps_tensor=False, state_bytes=8.0),
    "m2rnn": Software(shares_keys=True),  # Mamba-2 by the kernels of mamba_ssm
    "fms": Software(logits_bytes=10.0, recomputed_products=0.5),
}
_OTHERS = Software()
# Programs whose tensor parallelism computes the loss of each GPU's share of the vocabulary.
_SPLIT_LOGITS = {"titan"}
# Programs whose torch.compile takes the loss too: of logits they store those of bf16, and their
# gradient.
_COMPILED_LOSS = {"titan"}
# Programs that shard weights and moments, 6 bytes a parameter of bf16, and reduce gradients with a
# step's last micro-batch alone: whole ones add up until then, in float32.
_REDUCES_LAST = {"kempner"}
_IN_GIB = {"kempner"}  # sources that give memory in GiB

_RUN_COLUMNS = (
    *("id", "gpu", "num_gpus", "parameters", "hidden", "heads", "kv_heads", "mlp_kind"),
    *("intermediate", "vocab", "tied_embeddings", "pattern", "mixer_dims", "seq_len"),
    *("micro_batch", "global_batch_tokens", "precision", "tensor", "pipeline", "context"),
    *("expert", "sharding", "activation_checkpointing", "tokens_per_second_per_gpu"),
    *("memory_gb", "specified", "notes"),
)
_KERNEL_COLUMNS = (
    *("id", "gpu", "op", "implementation", "pass", "batch", "seq_len", "heads_qk", "heads_v"),
    *("key_dim", "value_dim", "dtype", "ms", "launches_counted", "notes"),
)
_SHARDING = ("none", "zero1", "zero2", "zero3", "zero3-in-node", "zero3-in-groups")


@dataclass(frozen=True)
class MeasuredRun:
    """A published training run.

    Attributes:
        kind: ``transformer`` or ``recurrent``: any layer that is not softmax attention.
        tokens_per_second: Of each GPU.
        memory: Peak bytes of a GPU; None: not published.
        described: Whether the source says enough to judge a plan by it: of dense transformers
            everything that matters (``specified`` is ``full``), of others the micro-batch.
        assumed_batch: Whether the micro-batch is not known, and chosen (``planner_fit``).
    """

    id: str
    source: str
    kind: str
    config: RunConfig
    vocab_size: int
    hardware: str
    devices: int
    software: Software
    tokens_per_second: float
    memory: float | None
    assumed_batch: bool
    described: bool
    devices_per_node: int = 8


@dataclass(frozen=True)
class MeasuredKernel:
    """A published time of one operation.

    Attributes:
        passes: ``fwd``, ``bwd`` or ``fwd+bwd``.
        longest: Tokens of the longest sequence.
        seconds: Seconds of all passes.
        host: Whether launching from Python is in it.
    """

    id: str
    source: str
    op: str
    implementation: str
    hardware: str
    passes: str
    tokens: int
    longest: int
    num_heads: int
    num_qk_heads: int
    key_dim: int
    value_dim: int
    causal: bool
    seconds: float
    host: bool


def read_runs(
    path: Path = DATA / "throughput.csv", precision: Literal["bf16", "fp8"] = "bf16"
) -> tuple[list[MeasuredRun], dict[str, str]]:
    """Return the runs of a table in the format of README.md, and why others are left out, by id.

    They are those of one precision. Raises UserError naming the line and column of a value that
    cannot be read.
    """
    found, left = [], {}
    for row in table_rows(path, _RUN_COLUMNS):
        try:
            found.append(_run(row, precision))
        except LeftOut as why:
            left[row["id"]] = str(why)
    return found, left


def read_kernels(
    path: Path = DATA / "kernel_times.csv",
) -> tuple[list[MeasuredKernel], dict[str, str]]:
    """Return the kernels of a table in the format of README.md, and why others are left out.

    Raises UserError naming the line and column of a value that cannot be read.
    """
    found, left = [], {}
    for row in table_rows(path, _KERNEL_COLUMNS):
        try:
            found.append(_kernel(row))
        except LeftOut as why:
            left[row["id"]] = str(why)
    return found, left


def _run(row: Row, precision: Literal["bf16", "fp8"]) -> MeasuredRun:
    source = row["id"].partition("-")[0]
    if row["precision"] != precision:
        raise LeftOut(f"precision is {row['precision'] or 'not known'}, which is not compared")
    if row["gpu"] not in HARDWARE:
        raise LeftOut(f"no hardware file of {row['gpu'] or 'an unknown GPU'}")
    if row.whole("context", 1) > 1:
        raise LeftOut("context parallel, which is not planned")
    measured = row.number("tokens_per_second_per_gpu")
    if measured is None:
        raise LeftOut("no tokens per second")
    if not row["pattern"]:
        raise LeftOut("the layers are not known")
    names = set(re.findall(r"[a-z_][a-z0-9_]*", row["pattern"]))
    if "linear_attn" in names and "of 512" in row["mixer_dims"]:
        raise LeftOut("keys of 512 channels, which no fused kernel here takes")
    if names - _MIXERS:
        raise LeftOut(f"no layer {', '.join(sorted(names - _MIXERS))}")
    kind = "transformer" if names == {"attn"} else "recurrent"
    moe = row["mlp_kind"] == "moe"
    micro = row.whole("micro_batch", 0)
    if not micro and not (kind == "recurrent" or moe):
        raise LeftOut("the micro-batch is not known")
    if "divided into micro-batches" in row["notes"]:
        raise LeftOut("how many sequences the pipeline takes at once is not known")
    seq_len, devices = row.whole("seq_len"), row.whole("num_gpus")
    hidden, vocab_size = row.whole("hidden"), row.whole("vocab")
    try:
        model = ModelConfig(
            row["pattern"],
            hidden,
            mixers={name: _mixer(name, row) for name in sorted(names)},
            mlp=_mlp(row, hidden),
            moe=_experts(row) if moe else None,
            vocab_size=vocab_size,
            tie_embeddings=row.one_of("tied_embeddings", "false", "true") == "true",
        )
    except ConfigError as error:
        raise LeftOut(f"no model of this project: {error}") from None
    model = _with_parameters(model, row, vocab_size)
    rows_at_once = micro or 1
    parallel = _layout(row, rows_at_once)
    if devices % parallel.model_size:
        raise UserError(
            f"{row.where}, num_gpus: {devices}, expected a multiple of tensor x pipeline, "
            f"{parallel.model_size}"
        )
    tokens = seq_len * rows_at_once * (devices // parallel.model_size)
    checkpointing = row.one_of("activation_checkpointing", "none", "selective", "block")
    train = TrainConfig(
        steps=1,
        seq_len=seq_len,
        precision=precision,
        global_batch_tokens=max(row.whole("global_batch_tokens", tokens) // tokens, 1) * tokens,
        activation_checkpointing=checkpointing,  # type: ignore[arg-type]
    )
    software = _SOURCES.get(source, _OTHERS)
    if checkpointing != "selective":
        software = dataclasses.replace(software, recomputed_products=0.0)
    if source in _COMPILED_LOSS and "torch.compile" in row["kernels"]:
        software = dataclasses.replace(software, logits_bytes=4.0)
    if source in _SPLIT_LOGITS:
        share = software.logits_bytes / parallel.tensor
        software = dataclasses.replace(software, logits_bytes=share)
    if source in _REDUCES_LAST and devices > 1 and train.global_batch_tokens > tokens:
        software = dataclasses.replace(software, state_bytes=6.0, whole_gradients=4.0)
    memory = row.number("memory_gb")
    full = row.one_of("specified", "part", "full") == "full"
    described = full if kind == "transformer" and not moe else micro > 0
    return MeasuredRun(
        row["id"],
        source,
        kind,
        RunConfig(row["id"], model, train=train, parallel=parallel),
        vocab_size,
        HARDWARE[row["gpu"]],
        devices,
        software,
        measured,
        None if memory is None else memory * (2**30 if source in _IN_GIB else 1e9),
        not micro,
        described,
        _PER_NODE.get(source, 8),
    )


def _with_parameters(model: ModelConfig, row: Row, vocab_size: int) -> ModelConfig:
    """Give the MLP, where its width is not known, the width that makes the parameters the row's."""
    wanted = row.number("parameters")
    if row.number("intermediate") is not None or wanted is None:
        return model
    width = model.mlp.width(model.hidden_size)
    depth = len(block_specs(model))
    surplus = count_model(model, vocab_size, 1).parameters - wanted
    width -= int(surplus / (3 * model.hidden_size * depth) // 64 * 64)
    mlp = dataclasses.replace(model.mlp, intermediate_size=max(width, 64))
    return dataclasses.replace(model, mlp=mlp)


def _layout(row: Row, micro_batch_size: int) -> ParallelConfig:
    sharding = row.one_of("sharding", *_SHARDING)
    zero3 = sharding.startswith("zero3")
    parts = re.search(r"virtual stages (\d+)", row["notes"])
    pipeline = row.whole("pipeline", 1)
    return ParallelConfig(
        tensor=row.whole("tensor", 1),
        sequence=row.whole("tensor", 1) > 1,
        pipeline=pipeline,
        virtual_pipeline=int(parts[1]) if parts and pipeline > 1 else 1,
        expert=1 if zero3 else row.whole("expert", 1),
        micro_batch_size=micro_batch_size,
        zero_stage=3 if zero3 else int(sharding in ("zero1", "zero2")),
        zero_backend="deepspeed" if zero3 else "megatron",
    )


def _mlp(row: Row, hidden: int) -> MLPConfig:
    kind = {"relu2": "gelu", "moe": "swiglu"}.get(row["mlp_kind"], row["mlp_kind"])
    if not kind:
        raise LeftOut("the MLP is not known")
    width = row.number("intermediate")
    if width is None:  # fla's default: 4 x 2/3 of the width, in steps of 256
        width = -(-hidden * 8 // 3 // 256) * 256
    return MLPConfig(kind=kind, intermediate_size=int(width))  # type: ignore[arg-type]


def _experts(row: Row) -> MoEConfig:
    found = re.search(
        r"(\d+) experts of (\d+), (\d+) a token(?:, a shared one of (\d+))?", row["notes"]
    )
    if found is None:
        raise LeftOut("the experts are not known")
    number, width, top_k, shared = (int(x or 0) for x in found.groups())
    return MoEConfig(
        num_experts=number, top_k=top_k, intermediate_size=width, shared_intermediate_size=shared
    )


def _mixer(name: str, row: Row) -> dict[str, Any]:
    """Return a mixer's sizes, from ``mixer_dims``; of several: ``NAME: sizes; NAME: sizes``."""
    text = row["mixer_dims"]
    parts = dict(part.strip().split(": ", 1) for part in text.split(";") if ": " in part)
    text = parts.get(name, text)

    def number(pattern: str) -> int | None:
        found = re.search(pattern, text)
        return None if found is None else int(found[1])

    hidden, given = row.whole("hidden"), row.number("heads")
    num_heads = number(r"(\d+) heads") or (None if given is None else int(given))
    if num_heads is None:
        raise LeftOut("the number of heads is not known")
    head_dim = number(r"head_dim[= ](\d+)") or number(r"heads of (\d+)") or number(r"key (\d+)")
    head_dim = head_dim or hidden // num_heads
    value_dim = number(r"value (\d+)") or head_dim
    if name == "attn":
        kv_heads = row.number("kv_heads")
        shared = {} if kv_heads is None else {"num_kv_heads": int(kv_heads)}
        return {"num_heads": num_heads, "head_dim": head_dim, **shared}
    if name == "mamba2":
        inner, state = number(r"inner (\d+)") or 2 * hidden, number(r"state (\d+)")
        return {"expand": inner / hidden, "head_dim": inner // num_heads, "state_size": state}
    if name == "m2rnn":
        return {"num_heads": num_heads, "head_dim": head_dim, "value_dim": value_dim}
    if name == "hgrn2":
        return {"num_heads": num_heads, "head_dim": head_dim}
    sizes: dict[str, Any] = {
        "num_heads": num_heads,
        "head_dim": head_dim,
        "expand_v": value_dim / head_dim,
    }
    if name == "delta_product":
        return {**sizes, "num_householder": number(r"(\d+) steps") or 2}
    return sizes


def _kernel(row: Row) -> MeasuredKernel:
    if row["gpu"] not in HARDWARE:
        raise LeftOut(f"no hardware file of {row['gpu'] or 'an unknown GPU'}")
    if row["op"] not in ("gdn", "kda", "gla", "retnet", "deltanet", "attention"):
        raise LeftOut(f"a plain {row['op']} operation")
    if row["dtype"] not in ("bf16", "fp16"):
        raise LeftOut(f"computed in {row['dtype'] or 'an unknown type'}, which is not planned")
    length, batch = row.whole("seq_len"), row.whole("batch", 1)
    packed = re.search(r"(\d+) packed sequences", row["notes"])
    number = int(packed[1]) if packed else 1
    # Random cuts: the longest of n is about H_n / n of the whole.
    share = sum(1 / k for k in range(1, number + 1)) / number
    milliseconds = row.number("ms")
    if milliseconds is None:
        raise LeftOut("no time")
    heads = row.whole("heads_v")
    return MeasuredKernel(
        row["id"],
        row["id"].partition("-")[0],
        row["op"],
        row["implementation"],
        HARDWARE[row["gpu"]],
        row.one_of("pass", "fwd", "bwd", "fwd+bwd"),
        batch * length,
        max(int(length * share), 1),
        heads,
        row.whole("heads_qk", heads),
        row.whole("key_dim"),
        row.whole("value_dim"),
        "not causal" not in row["notes"],
        milliseconds / 1e3,
        row.one_of("launches_counted", "no", "yes") == "yes",
    )
