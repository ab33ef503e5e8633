"""``python -m pretrain`` on a tiny model: a run directory, its config, and processes on it."""

from __future__ import annotations

import json
import time

from tests.helpers.processes import run_interpreter, start

STEPS = 16
QUICK = ("sample.tokens=0", "logging.every=1", "validation.every=2", "checkpoint.every=2")


CONFIG = """
name: tiny
model:
  hidden_size: 24
  pattern: gdn attn
  mixers: {{gdn: {{num_heads: 2, head_dim: 4, chunk_size: 8}}, attn: {{num_heads: 4}}}}
data: {{path: {data}}}
optimizer: {{lr: 1e-2}}
schedule: {{warmup_steps: 2}}
train: {{steps: {steps}, seq_len: 32, global_batch_tokens: 128}}
parallel: {{micro_batch_size: 2}}
validation: {{every: 5, tokens: 128}}
checkpoint: {{every: 3}}
logging: {{every: 1}}
sample: {{tokens: 8}}
directory: {directory}
"""


class Run:
    """A run directory, its config, and processes on it."""

    def __init__(self, folder, corpus, name, **changes):
        self.directory = folder / name
        self.config = folder / f"{name}.yaml"
        values = {"data": corpus, "steps": STEPS, "directory": self.directory, **changes}
        self.config.write_text(CONFIG.format(**values))

    def start(self, *overrides):
        return start("pretrain", self.config, *overrides)

    def finish(self, *overrides):
        """Exit status and output."""
        process = self.start(*overrides)
        output, _ = process.communicate(timeout=600)
        return process.returncode, output

    def finish_interpreter(self, *overrides):
        """As ``finish``, in a new interpreter as a person starts one."""
        return run_interpreter("-m", "pretrain", self.config, *overrides)

    @property
    def metrics(self):
        path = self.directory / "metrics.jsonl"
        return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []

    @property
    def losses(self):
        """What must not depend on interruptions: everything measured but time and memory."""
        keys = ("step", "tokens", "loss", "lr", "grad_norm", "valid_loss", "valid_bits_per_byte")
        return [{k: row[k] for k in keys if k in row} for row in self.metrics]

    def wait_until(self, process, happens):
        end = time.monotonic() + 60
        while not happens() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.001)


def untimed(row):
    """A line of the metrics without what depends on the machine and its load."""
    timed = ("tokens_per_second", "mfu", "memory", "goodput", "time_to_first_step")
    seconds = ("seconds", "total_seconds", "slowest_rank", "slowest_rank_ratio")
    return {
        name: value
        for name, value in row.items()
        if name not in (*timed, *seconds) and not name.startswith("time/")
    }


def whole_lines(run):
    """Rows of the metrics that have been written to their end."""
    path = run.directory / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
