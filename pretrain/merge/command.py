"""The command ``python -m pretrain merge``: averaged weights of a run as a checkpoint."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.checkpoint.writer import write_weights
from pretrain.checkpoint_folders import checkpoint_name, checkpoint_step, list_checkpoints
from pretrain.common.errors import UserError
from pretrain.common.files import write_json
from pretrain.common.outputs import check_folder
from pretrain.config import DECAYS, RunConfig, load_saved_config
from pretrain.data.batches import PreparedData, open_data
from pretrain.data.tokenizer import Tokenizer
from pretrain.data.validation import validation_batches
from pretrain.inference.load import load_model
from pretrain.merge.averaging import average_into, check_mergeable
from pretrain.merge.weights import RULES, check_constant, weights_of
from pretrain.model.build import build_model
from pretrain.model.language_model import LanguageModel
from pretrain.parallel.processes import start_processes, stop_processes
from pretrain.run_directory import CONFIG_FILE, RunDirectory, find_checkpoint

MERGE_FILE = "merge.json"  # of a merge's directory
_STEPS = "expected at least two of the run's"


@dataclass
class Merge:
    """What to merge: the checkpoints of a run in ascending order, and their weights."""

    run: RunDirectory
    checkpoints: list[Path]
    weights: list[float]
    rule: str
    decay: str
    final_ratio: float

    @property
    def steps(self) -> list[int]:
        """Return the steps of the checkpoints."""
        return [checkpoint_step(path) for path in self.checkpoints]

    @property
    def name(self) -> str:
        """Return a name for a folder."""
        shape = f"-{self.decay}-{self.final_ratio:g}" if self.rule == "inverse-decay" else ""
        return f"{self.rule}{shape}-{len(self.steps)}-of-{self.steps[0]}-{self.steps[-1]}"


def plan_merge(
    run: str | Path,
    *,
    last: int | None = None,
    steps: Sequence[int] | None = None,
    rule: str = "mean",
    decay: Any = None,
    final_ratio: float | None = None,
) -> Merge:
    """Choose the checkpoints of a run, and their weights.

    ``last``: the newest so many; ``steps``: those of these steps; neither: all that there are.
    ``decay`` and ``final_ratio`` are those of the run's schedule unless given. Raises UserError
    where there are none such, or the rule does not fit them.
    """
    directory = RunDirectory(run)
    there = {checkpoint_step(path): path for path in list_checkpoints(directory.checkpoints)}
    listed = ", ".join(map(str, sorted(there))) or "none"
    if len(there) < 2:
        raise UserError(
            f"{directory} has the checkpoints of these steps: {listed}; expected at least two to "
            "merge (checkpoint.keep_last and checkpoint.keep say how many a run keeps)"
        )
    chosen = sorted(there)
    if steps is not None:
        missing = [step for step in steps if step not in there]
        if missing or len(set(steps)) < 2:
            raise UserError(f"--steps is {list(steps)}, {_STEPS} checkpoints: {listed}")
        chosen = sorted(set(steps))
    elif last is not None:
        if not 2 <= last <= len(there):
            raise UserError(f"--last is {last}, {_STEPS} {len(there)} checkpoints: {listed}")
        chosen = chosen[-last:]
    checkpoints = [there[step] for step in chosen]
    config = load_saved_config(checkpoints[-1] / CONFIG_FILE)
    decay = decay or config.schedule.decay
    final_ratio = config.schedule.final_ratio if final_ratio is None else final_ratio
    if rule == "inverse-decay":
        if not 0 <= final_ratio < 1 or (decay == "exponential" and final_ratio == 0):
            low = "above 0" if decay == "exponential" else "at least 0"
            raise UserError(f"--final-ratio is {final_ratio:g}, expected {low} and below 1")
        plan = config.plan
        rates = [plan.learning_rate(step) for step in range(chosen[-1])]
        check_constant(rates, chosen[0], chosen[-1])
    weights = weights_of(rule, chosen, decay, final_ratio).tolist()
    return Merge(directory, checkpoints, weights, rule, decay, final_ratio)


def merge(planned: Merge, out: Path) -> tuple[Path, LanguageModel]:
    """Write the checkpoint of a merge into the new directory ``out``; return it and its model.

    It has the weights alone, in float32: it can be scored, exported and given to ``initialize``,
    and training cannot be resumed from it. Raises UserError where ``out`` exists.
    """
    check_folder(out, "--out")
    if out.exists():
        raise UserError(f"--out is {out}, which already exists; expected a new folder")
    states = check_mergeable(planned.checkpoints)
    last = planned.checkpoints[-1]
    state = dataclasses.replace(states[-1], precision="float32")
    model = build_model(state.model_config, state.vocab_size, seed=0)
    average_into(model, planned.checkpoints, planned.weights)
    config = copy.deepcopy(load_saved_config(last / CONFIG_FILE))
    config.name, config.directory = out.name, str(out)
    tokenizer = Tokenizer.load(last).path
    out.mkdir(parents=True)
    RunDirectory(out).write_config(config)
    return write_weights(RunDirectory(out).checkpoints, model, config, state, tokenizer), model


@torch.no_grad()
def validation_losses(model: LanguageModel, config: RunConfig, data: PreparedData) -> np.ndarray:
    """Return the mean loss, in nats, of every window that validation in training scores."""
    batches = validation_batches(
        data, config.train, 1, config.validation.tokens, config.data.prefix
    )
    device = next(model.parameters()).device
    model.eval()
    losses = []
    for batch in (b.to(device) for windows in batches.values() for b in windows):
        found = model(batch.tokens, batch.targets, sequences=batch.sequences)
        losses.append(float(found[batch.loss_mask > 0].double().mean()))
    return np.array(losses)


def compare(
    planned: Merge, model: LanguageModel, against: Sequence[str | Path] = ()
) -> dict[str, Any]:
    """Return the validation losses of the merge and of its last checkpoint, with standard errors.

    Also those of the runs or checkpoints ``against``. The errors are those of drawing the windows;
    that of a difference is of both on the same ones.
    """
    config = load_saved_config(planned.checkpoints[-1] / CONFIG_FILE)
    data = open_data(config.data)
    merged = validation_losses(model, config, data)
    if len(merged) < 2:
        raise UserError("the data has fewer than two windows of validation text")

    def beside(path: str | Path) -> tuple[list[float], list[float]]:
        found = load_model(path)
        if found.state.tokenizer_sha256 != data.tokenizer.sha256:
            raise UserError(f"--against is {path}, which has another tokenizer than {planned.run}")
        losses = validation_losses(found.model, config, data)
        return _mean_and_error(losses), _mean_and_error(merged - losses)

    last, difference = beside(planned.checkpoints[-1])
    others = {str(path): beside(path) for path in against}
    return {
        "merged": _mean_and_error(merged),
        "last": last,
        "difference": difference,
        "windows": len(merged),
        "against": {n: {"loss": loss, "difference": d} for n, (loss, d) in others.items()},
    }


def _mean_and_error(values: np.ndarray) -> list[float]:
    return [float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))]


def main(arguments: Sequence[str]) -> int:
    """Merge as ``arguments`` say; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain merge",
        description="Average the weights of a run's checkpoints into a new checkpoint, and compare "
        "its validation loss with the last one's.",
    )
    parser.add_argument("run", help="a run directory with several checkpoints")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--last", type=int, metavar="N", help="the newest N checkpoints (all)")
    which.add_argument("--steps", type=int, nargs="+", metavar="STEP", help="those of these steps")
    parser.add_argument(
        "--weights",
        choices=RULES,
        default="mean",
        help="equal ones (mean), rising up to the last (linear), or those of a decay of the same "
        "updates (inverse-decay)",
    )
    parser.add_argument("--decay", choices=DECAYS, help="inverse-decay: its shape (the schedule's)")
    parser.add_argument(
        "--final-ratio",
        type=float,
        help="inverse-decay: its last rate as a share of the peak (the schedule's)",
    )
    parser.add_argument("--out", type=Path, help="a new folder (RUN/merges/NAME)")
    parser.add_argument(
        "--no-validation", action="store_true", help="do not compare validation losses"
    )
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="RUN",
        help="compare with these runs or checkpoints too, such as real decays",
    )
    given = parser.parse_args(arguments)
    for path in given.against:  # before the work
        find_checkpoint(Path(path))
    if given.weights != "inverse-decay":
        for option, value in (("--decay", given.decay), ("--final-ratio", given.final_ratio)):
            if value is not None:
                raise UserError(
                    f"{option} is {value}, which is of --weights inverse-decay alone; found "
                    f"--weights {given.weights}"
                )
    planned = plan_merge(
        given.run,
        last=given.last,
        steps=given.steps,
        rule=given.weights,
        decay=given.decay,
        final_ratio=given.final_ratio,
    )
    out = given.out or planned.run.path / "merges" / planned.name
    start_processes()
    try:
        checkpoint, model = merge(planned, out)
        shares = ", ".join(
            f"step {s} {w:.4g}" for s, w in zip(planned.steps, planned.weights, strict=True)
        )
        print(f"weights      {shares}\nwritten to   {checkpoint}")
        plan = load_saved_config(checkpoint / CONFIG_FILE).plan
        noted: dict[str, Any] = {
            "run": str(planned.run),
            "rule": planned.rule,
            "decay": planned.decay,
            "final_ratio": planned.final_ratio,
            "steps": planned.steps,
            "tokens": plan.tokens_before(planned.steps[-1]),
            "weights": planned.weights,
            "validation": None,
        }
        write_json(out / MERGE_FILE, noted)
        if not given.no_validation:
            _say_losses(noted, planned, model, given.against)
            write_json(out / MERGE_FILE, noted)
    finally:
        stop_processes()
    print(f"next         python -m evals {out}\n             initialize.checkpoint={out}")
    return 0


def _say_losses(
    noted: dict[str, Any], planned: Merge, model: LanguageModel, against: Sequence[str]
) -> None:
    try:
        found = compare(planned, model, against)
    except UserError as refused:
        print(f"no validation losses: {refused}")
        return
    noted["validation"] = found
    (merged, error), windows = found["merged"], found["windows"]
    print(f"validation   {merged:.4f} \u00b1 {error:.4f} nats per token of {windows} windows")
    last = {"loss": found["last"], "difference": found["difference"]}
    for name, other in {checkpoint_name(planned.steps[-1]): last, **found["against"]}.items():
        difference, apart = other["difference"]
        print(
            f"             {other['loss'][0]:.4f} of {name}, difference {difference:+.4f} \u00b1 "
            f"{apart:.4f}"
        )
