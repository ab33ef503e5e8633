"""``python -m evals paths RUN --task NAME``: search layer paths for a task, and judge them.

A path is searched on one half of the questions and scored on the other; as many random paths of the
same lengths, and noise in the unchanged weights, tell what so many trials reach without a search.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pretrain.common.argument_types import positive
from pretrain.common.errors import UserError
from pretrain.common.files import file_name, write_json
from pretrain.common.screen import plain_console, titled_table

if TYPE_CHECKING:
    from evals.layer_paths.controls import Asked, Trials
    from evals.layer_paths.space import Path
    from pretrain.model.language_model import LanguageModel

_STEPS = 8  # of looking for the noise whose effect is as large as the paths'
_SCALES = (1e-3, 1.0)  # between which it is, as a share of weights


def main(arguments: Sequence[str]) -> int:
    """Search, print the table, and write the result beside the run's other evaluations."""
    given = _parser().parse_args(arguments)
    from evals.harness.checkpoint_evaluation import harness_model
    from evals.layer_paths.questions import Questions
    from evals.tasks.loading import check_tasks
    from pretrain.inference.layer_paths import set_path
    from pretrain.inference.load import load_model
    from pretrain.parallel.processes import stop_processes

    check_tasks([given.task])
    loaded = load_model(given.checkpoint)
    set_path(loaded.model, range(len(loaded.model.blocks)))  # refuses a model with a loop
    set_path(loaded.model, None)
    bos = "document" if loaded.imported is None else "model"
    harness = harness_model(loaded, bos=bos, max_length=given.max_length)
    questions = Questions(harness, given.task, given.questions, given.num_fewshot)
    result = find_paths(
        loaded.model,
        questions,
        evaluations=given.evaluations,
        seed=given.seed,
        prior=not given.no_prior,
        exploration=given.exploration,
        length_penalty=given.length_penalty,
    )
    result = {"task": given.task, "checkpoint": str(loaded.checkpoint), **result}
    folder = loaded.evals_directory
    folder.mkdir(parents=True, exist_ok=True)
    name = file_name(f"paths-{given.task}-{loaded.checkpoint.name}")
    path = folder / f"{name}.json"
    write_json(path, result)
    show(result)
    print(f"written to {path}")
    stop_processes()
    return 0


def find_paths(
    model: LanguageModel,
    questions: Asked,
    *,
    evaluations: int,
    seed: int = 0,
    prior: bool = True,
    exploration: float = 0.3,
    length_penalty: float = 0.05,
) -> dict[str, Any]:
    """Return what a search over paths finds, and what the controls do, as it is written to a file.

    The number of evaluations is that of the search, of the random paths and of the noisy models
    each. The model is left as it was.
    """
    import numpy as np

    from evals.layer_paths.controls import Trials, judge, noise, reward
    from evals.layer_paths.questions import divergence
    from evals.layer_paths.search import search_paths
    from evals.layer_paths.space import random_paths
    from pretrain.inference.layer_paths import path_text, set_path

    identity = tuple(range(len(model.blocks)))
    searched = np.zeros(len(questions), dtype=bool)
    halves = random.Random(seed).sample(range(len(questions)), len(questions) // 2)
    searched[halves] = True
    found: dict[Path, Any] = {}

    def scores(path: Path) -> Any:
        if path not in found:
            set_path(model, path)
            try:
                found[path] = questions.scores(prior=prior)
            finally:
                set_path(model, None)
        return found[path]

    def allowed(path: Path) -> bool:
        try:
            set_path(model, path)
        except UserError:  # a block before the one whose values it takes
            return False
        finally:
            model.layer_path = None
        return True

    unchanged = scores(identity)
    rewards = search_paths(
        identity,
        lambda path: reward(scores(path), questions.gold, searched),
        evaluations=evaluations,
        seed=seed,
        exploration=exploration,
        length_penalty=length_penalty,
        allowed=allowed,
    )
    tried = [path for path in rewards if path != identity]
    if not tried:
        raise UserError(f"the model has {len(identity)} blocks, and no other path through them")
    others = random_paths([len(path) for path in tried], identity, random.Random(seed + 1), allowed)
    typical = statistics.median(divergence(unchanged, found[path]) for path in tried)

    def noisy(scale: float, number: int) -> Any:
        with noise(model, scale, seed + number):
            return questions.scores(prior=prior)

    scale = _matching(lambda s: divergence(unchanged, noisy(s, 0)), typical)
    trials = {
        "search": _trials(Trials, tried, found.__getitem__),
        "random paths": _trials(Trials, others, scores),
        "noise in weights": Trials(
            [f"noise {number}" for number in range(1, len(tried) + 1)],
            [noisy(scale, number) for number in range(1, len(tried) + 1)],
        ),
    }
    correct = unchanged.argmax(-1) == questions.gold
    judged = {
        name: judge(kind, unchanged, questions.gold, questions.num_choices, searched, seed)
        for name, kind in trials.items()
    }
    return {
        "questions": len(questions),
        "searched_on": int(searched.sum()),
        "evaluations": len(tried),
        "blocks": len(identity),
        "prior": prior,
        "noise_scale": scale,
        "divergence": typical,
        "unchanged": {
            "searched": float(correct[searched].mean()),
            "held_out": float(correct[~searched].mean()),
        },
        "kinds": {name: dataclasses.asdict(finding) for name, finding in judged.items()},
        "front": [
            {
                "path": path_text(path),
                "blocks": len(path),
                "reward": rewards[path],
                "held_out": float((found[path].argmax(-1) == questions.gold)[~searched].mean()),
            }
            for path in _front(rewards)
        ],
    }


def show(result: dict[str, Any]) -> None:
    """Print what was found."""
    console = plain_console(soft_wrap=True)
    before = result["unchanged"]
    console.print(
        f"{result['task']}: {result['questions']} questions, {result['searched_on']} to search on; "
        f"{result['evaluations']} trials of each kind; {result['blocks']} blocks, unchanged "
        f"accuracy {before['searched']:.3f} on the first half and {before['held_out']:.3f} on the "
        "other"
    )
    kinds = result["kinds"]
    table = titled_table(None, "", *kinds)
    for title, cell in _ROWS.items():
        table.add_row(title, *(cell(kind) for kind in kinds.values()))
    console.print(table)
    console.print("intervals of 95 % over questions; wrong answers: of the unchanged model")
    front = titled_table("best paths by length", "blocks", "path", "p(answer)", "other half")
    for row in result["front"]:
        front.add_row(
            str(row["blocks"]), row["path"], f"{row['reward']:.3f}", f"{row['held_out']:.3f}"
        )
    console.print(front)


def _trials(kind: type[Trials], paths: Sequence[Path], scores: Callable[[Path], Any]) -> Trials:
    from pretrain.inference.layer_paths import path_text

    return kind([path_text(path) for path in paths], [scores(path) for path in paths])


def _matching(effect: Callable[[float], float], wanted: float) -> float:
    """Return the scale at which ``effect``, which grows with it, is about ``wanted``."""
    low, high = _SCALES
    for _ in range(_STEPS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if effect(middle) < wanted else (low, middle)
    return float((low * high) ** 0.5)


def _front(rewards: dict[Path, float]) -> list[Path]:
    """Return the paths that no shorter one equals, from the shortest on."""
    front: list[Path] = []
    for path in sorted(rewards, key=lambda p: (len(p), -rewards[p])):
        if not front or rewards[path] > rewards[front[-1]]:
            front.append(path)
    return front


def _interval(value: float | None, ends: Sequence[float] | None) -> str:
    if value is None or ends is None:  # two choices, all answered wrong: there is no other
        return "-"
    return f"{value:+.3f}\n[{ends[0]:+.3f}, {ends[1]:+.3f}]"


_ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "wrong answers mended by some trial": lambda kind: f"{kind['found']:.3f}",
    "other wrong answers given by some trial": lambda kind: (
        "-" if kind["found_wrong"] is None else f"{kind['found_wrong']:.3f}"
    ),
    "difference: beyond luck": lambda kind: _interval(
        kind["beyond_luck"], kind["beyond_luck_interval"]
    ),
    "chosen on the first half": lambda kind: kind["chosen"],
    "its accuracy there": lambda kind: f"{kind['searched']:.3f}",
    "and on the other half": lambda kind: f"{kind['held_out']:.3f}",
    "gain on the other half": lambda kind: _interval(kind["gain"], kind["gain_interval"]),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evals paths", description=__doc__)
    parser.add_argument("checkpoint", help="a run directory or one of its checkpoints/step-N")
    parser.add_argument("--task", required=True, help="a multiple-choice task")
    parser.add_argument(
        "--questions", type=positive, default=100, help="of the task, the first ones (100)"
    )
    parser.add_argument(
        "--evaluations", type=positive, default=40, help="paths to try, and of each control (40)"
    )
    parser.add_argument("--num-fewshot", type=positive, help="examples per prompt (the task's)")
    parser.add_argument("--max-length", type=positive, help="tokens per request (training length)")
    parser.add_argument("--seed", type=int, default=0, help="of halves, search and controls (0)")
    parser.add_argument(
        "--exploration", type=float, default=0.3, help="weight of what was tried little (0.3)"
    )
    parser.add_argument(
        "--length-penalty", type=float, default=0.05, help="cost of as many blocks again (0.05)"
    )
    parser.add_argument(
        "--no-prior",
        action="store_true",
        help="compare plain likelihoods, not those over the choice's own behind an empty prompt",
    )
    return parser
