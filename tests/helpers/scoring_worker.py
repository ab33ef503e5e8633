"""Scores between training steps under several layouts, in one launch of four processes; see
test_scoring_layouts.py. ``torchrun --nproc-per-node 4 -m tests.helpers.scoring_worker FILE``
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from evals.harness.in_loop import make_scorer
from pretrain.config import EvalConfig, RunConfig
from pretrain.inference.score import Pair, Prompt
from pretrain.parallel.processes import is_main_process, stop_processes
from tests.helpers.parallel_worker import ALL_LAYOUTS, MODELS, make, start, step_of
from tests.helpers.small_model import VOCAB

HEADER = list(range(1, 25))
PAIRS = [
    Pair([*HEADER, *question], answer)
    for question in ([5, 6, 7], [5, 6, 8, 9, 10, 11])
    for answer in ([3, 4], [3, 9, 2, 2, 7], [11])
] + [Pair([VOCAB - 9], [3] * n) for n in range(1, 6)]
PROMPTS = [Prompt(pair.context, 4, lambda made: made[-1] == 2) for pair in PAIRS[::3]]
CASES = {
    f"{model}-{layout}": (model, layout)
    for model, layout in (
        ("tied", "tp2-dp2-zero0"),
        ("tied", "tp2-pp2-sequence"),
        ("tied", "pp2-vpp2-dp2"),
        ("tied", "dp4"),
        ("untied", "deepspeed-dp4-zero3"),
        ("experts", "ep2-dp4"),
        ("loop", "pp2-dp2-zero0"),
    )
}


ROWS = 4  # of a training step


def run(model: str, parallel: Any, *, score: bool = True) -> dict[str, Any]:
    """Two training steps and scores before each; ``score=False``: the steps alone."""
    engine = make(model, parallel)
    config: Any = RunConfig(
        "test", MODELS[model], parallel=parallel, eval=EvalConfig(tokens_per_pass=64)
    )
    tokenizer: Any = SimpleNamespace(vocab_size=VOCAB - 3, eod_id=0)
    scorer = make_scorer(config, engine, tokenizer)
    found: dict[str, Any] = {"steps": [], "scores": [], "texts": [], "by": type(scorer).__name__}
    for step in range(2):
        if score:
            engine.backend.gather_weights()
            found["scores"].append(scorer.log_likelihoods(PAIRS))
            found["texts"].append(scorer.generate(PROMPTS))
        found["steps"].append(step_of(engine, step, ROWS))
    return found


def main(path: Path) -> None:
    found = {}
    for name, (model, layout) in CASES.items():
        start(ALL_LAYOUTS[layout])
        found[name] = run(model, ALL_LAYOUTS[layout])
        found[f"{name}, without"] = run(model, ALL_LAYOUTS[layout], score=False)
    if is_main_process():
        path.write_text(json.dumps(found))
    stop_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
