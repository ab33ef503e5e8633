"""``python -m pretrain cache-teacher CONFIG``: write a teacher's likeliest ids of a run's tokens.

The folder is the run's ``distill.cache``. What is there is kept, so the same command goes on where
it was interrupted. Of several processes each has the whole teacher and writes some of the steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from pretrain.checkpoint.state import load_weights
from pretrain.common.dtypes import DTYPES
from pretrain.common.errors import UserError
from pretrain.common.outputs import check_folder
from pretrain.config import DistillConfig, ParallelConfig, RunConfig, load_run_config
from pretrain.data.batch import Batch
from pretrain.data.batches import TrainingBatches, open_data
from pretrain.data.teacher_top import TeacherTop
from pretrain.model.build import build_model
from pretrain.model.language_model import LanguageModel
from pretrain.ops.cross_entropy.likeliest import likeliest
from pretrain.parallel.processes import (
    data_parallel_rank_and_size,
    is_main_process,
    local_device,
    on_main_process,
    process_groups,
)
from pretrain.training.distilling import open_teacher
from pretrain.training.phases import history_of, open_phases, windows_of
from pretrain.training.teacher_cache import (
    begin_cache,
    checksums,
    identity_of,
    missing_steps,
    teacher_hash,
    write_step,
)

_STORED = {"float16": torch.float16, "float32": torch.float32}


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m pretrain cache-teacher", description=__doc__)
    parser.add_argument("config", help="of a run that sets distill.teacher and distill.cache")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--dtype",
        choices=sorted(_STORED),
        default="float16",
        help="of the log-probabilities (float16)",
    )
    options = parser.parse_intermixed_args(arguments)
    config = load_run_config(options.config, options.overrides)
    if config.distill is None or config.distill.cache is None:
        raise UserError(
            f"{options.config}: distill.cache is null, expected the folder to write a teacher's "
            "likeliest ids to"
        )
    folder = Path(config.distill.cache)
    check_folder(folder, "distill.cache")
    with process_groups(ParallelConfig()):
        written = write_cache(config, folder, _STORED[options.dtype])
        if is_main_process():
            print(f"{folder}: wrote {written} of {config.plan.num_steps} steps")
    return 0


def write_cache(config: RunConfig, folder: Path, dtype: torch.dtype = torch.float16) -> int:
    """Write the steps of a run's cache that are missing; return their number on all processes.

    Every process must call. Raises UserError where teacher, data or folder do not fit.
    """
    distill, plan = config.distill, config.plan
    assert distill is not None
    data = open_data(config.data)
    phases, windows = open_phases(plan, config.data, data), windows_of(plan, None)
    batches = TrainingBatches.of_run(plan, phases, windows, config.seed)
    identity = identity_of(config, data.tokenizer.sha256, history_of(plan, phases, windows))
    checkpoint, state = open_teacher(config, data.tokenizer.sha256)
    steps, vocabulary = plan.num_steps, data.tokenizer.vocab_size
    on_main_process(lambda: begin_cache(folder, identity, teacher_hash(checkpoint), steps))
    teacher = build_model(
        state.model_config, state.vocab_size, seed=0, dtype=DTYPES[config.train.precision]
    )
    load_weights(checkpoint, teacher)
    teacher.eval()
    rank, size = data_parallel_rank_and_size()
    every = on_main_process(lambda: missing_steps(folder, steps))
    for step in every[rank::size]:
        parts, sums = [], list[int]()
        seq_len = plan.phase_at(step).config.train.seq_len
        for batch in batches.micro_batches(step):
            batch = batch.to(local_device())
            parts.append(_said(teacher, batch, distill, vocabulary, dtype))
            sums += checksums(batch.tokens, seq_len)
        write_step(folder, step, parts, sums, vocabulary)
    on_main_process(lambda: None)  # until all have written
    return len(every)


@torch.no_grad()
def _said(
    teacher: LanguageModel,
    batch: Batch,
    distill: DistillConfig,
    vocabulary: int,
    dtype: torch.dtype,
) -> TeacherTop:
    """Return what the teacher says of a micro-batch's tokens, in host memory."""
    x = teacher.hidden_states(batch.tokens, sequences=batch.sequences)[0]
    found = likeliest(
        teacher._head_rows(x),
        teacher._head_weight,
        distill.top_k,
        tokens_at_once=max(teacher.logits_at_once // teacher.vocab_size, 1),
        vocabulary=vocabulary,
        temperature=distill.temperature,
        softcap=teacher.model_config.logit_softcap,
    )
    kept = (found.log_probs.to(dtype).cpu(), found.log_rest.to(dtype).cpu())
    return TeacherTop(found.ids.cpu(), *kept)
