"""The data of a run's phases, and whether those of a checkpoint are those of the settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pretrain.checkpoint.state import CheckpointState
from pretrain.common.errors import UserError
from pretrain.config import DataConfig, RunConfig
from pretrain.config.plan import RunPlan
from pretrain.data.batches import PreparedData, open_data


def open_phases(plan: RunPlan, config: DataConfig, data: PreparedData) -> list[PreparedData]:
    """Return the data of each phase, opening what differs from the run's ``data`` of ``config``.

    Raises UserError where it was tokenized otherwise.
    """
    known, found = [(config, data)], []
    for phase in plan.phases:
        own = phase.config.data
        opened = next((d for c, d in known if c == own), None)
        if opened is None:
            opened = open_data(own, known[-1][1].known)
            known.append((own, opened))
        if opened.tokenizer.sha256 != data.tokenizer.sha256:
            raise UserError(
                f"phases[{phase.number - 1}].data was made with another tokenizer "
                f"({opened.tokenizer.sha256[:12]}...) than the run's data "
                f"({data.tokenizer.sha256[:12]}...); prepare it with tokenizer: "
                f"{{path: {config.directories[0].path}}}"
            )
        found.append(opened)
    return found


def windows_of(plan: RunPlan, past: tuple[int, Sequence[dict[str, Any]]] | None) -> list[int]:
    """Return the tokens of the windows that each phase draws the order of.

    ``past``: the step that a run resumes from, and its history there. Phases that had begun have
    the windows that they began with, and so have later ones whose sequences are pieces of them.
    """
    lengths = [phase.config.train.seq_len for phase in plan.phases]
    if plan.phases[0].config.data.packing == "best_fit":
        return lengths  # what is packed is ordered, not windows
    given = plan.phases[0].config.data.window
    if past is None:
        return [given or max(lengths)] * len(lengths)
    step, history = past
    found = []
    for phase in plan.phases:
        if phase.first < step:
            entry = next((x for x in history if phase.first < x["steps"][1]), history[-1])
            found.append(int(entry["data.window"]))
            continue
        last = found[-1] if found else given or max(lengths)
        if given is not None and given % last == 0:
            last = given
        found.append(last if all(last % n == 0 for n in lengths) else given or max(lengths))
    return found


def history_of(
    plan: RunPlan, phases: Sequence[PreparedData], windows: Sequence[int]
) -> list[dict[str, Any]]:
    """Return what the order of the data of each phase depends on, as checkpoints have it."""
    return [
        {
            "steps": [phase.first, phase.last],
            "seq_len": phase.config.train.seq_len,
            "global_batch_tokens": phase.config.train.global_batch_tokens,
            "data": data.identity,
            "data.window": window,
            "data.packing": phase.config.data.packing,
        }
        for phase, data, window in zip(plan.phases, phases, windows, strict=True)
    ]


def history_in(state: CheckpointState, before: RunConfig) -> list[dict[str, Any]]:
    """Return what :func:`history_of` was for a checkpoint, saved with the settings ``before``."""
    if state.phases:
        return state.phases
    train = before.train  # of an earlier version: a run of one phase
    return [
        {
            "steps": [0, before.plan.num_steps],
            "seq_len": train.seq_len,
            "global_batch_tokens": train.global_batch_tokens,
            "data": state.data,
            "data.window": train.seq_len,
            "data.packing": "concatenate",
        }
    ]


def difference(
    was: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]], step: int
) -> tuple[str, Any, Any] | None:
    """Return the first setting in which two histories differ before ``step``, and its values.

    None where they are equal that far: what comes later may change.
    """
    one, other = _until(was, step), _until(now, step)
    for a, b in zip(one, other, strict=False):
        for name in a:
            if name != "steps" and a[name] != b[name]:
                return _value(name, a, step), *(_words(x[name]) for x in (a, b))
        if a["steps"] != b["steps"]:
            return "borders of phases", _borders(one), _borders(other)
    return None


def _borders(history: Sequence[dict[str, Any]]) -> str:
    steps = ", ".join(str(entry["steps"][1]) for entry in history[:-1])
    return f"after step {steps}" if steps else "nowhere"


def _value(name: str, entry: dict[str, Any], step: int) -> str:
    first, last = entry["steps"]
    names = {"seq_len": "train.seq_len", "global_batch_tokens": "train.global_batch_tokens"}
    name = names.get(name, name)
    return name if (first, last) == (0, step) else f"{name} (of steps {first + 1} to {last})"


def _words(value: Any) -> Any:
    return ", ".join(value) if isinstance(value, list) else value


def _until(history: Sequence[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """Return what there was before ``step``; borders that change nothing are none."""
    found: list[dict[str, Any]] = []
    for entry in history:
        first, last = entry["steps"]
        if first >= step:
            break
        end = min(last, step)
        if found and {**found[-1], "steps": 0} == {**entry, "steps": 0}:
            found[-1]["steps"] = [found[-1]["steps"][0], end]
        else:
            found.append({**entry, "steps": [first, end]})
    if found:
        found[-1]["steps"] = [found[-1]["steps"][0], step]  # a longer budget is no other past
    return found
