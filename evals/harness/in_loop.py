"""Evaluation while a run trains, on its own processes under whatever layout they have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from evals.harness.evaluation import evaluate_tasks, seeded, set_examples
from evals.harness.model import HarnessModel
from evals.harness.schedule_scoring import ScheduleScorer
from evals.tasks.loading import load_tasks
from pretrain.checkpoint.state import CheckpointState, checkpoint_name
from pretrain.common.errors import UserError
from pretrain.common.files import write_json
from pretrain.config import RunConfig
from pretrain.data.tokenizer import Tokenizer
from pretrain.inference.score import Scorer, StateScorer
from pretrain.parallel.processes import is_main_process
from pretrain.training.engine import Engine


class InLoopEvaluation:
    """The tasks of ``eval`` in a run's config. Every process makes one, loads the same tasks and
    gets the same scores; the weights, their optimizer and all random numbers stay as they are.

    ``alive`` is called now and then: an evaluation may take long. Raises UserError for tasks that
    do not exist or whose data is not there.
    """

    def __init__(
        self, config: RunConfig, engine: Engine, tokenizer: Tokenizer, alive: Callable[[], None]
    ) -> None:
        self.config, self.engine = config, engine
        settings = config.eval
        for name in settings.tasks:
            if name in ("perplexity", "positions"):
                raise UserError(
                    f"eval.tasks names '{name}', which is of a checkpoint: python -m evals RUN "
                    f"--tasks {name}; the loss on held-out text is 'validation' here"
                )
        self.scorer = make_scorer(config, engine, tokenizer)
        self.scorer.alive = alive
        length = settings.max_length or config.train.seq_len
        self.model = HarnessModel(self.scorer, tokenizer, length, bos=settings.bos)
        texts = self.model.text_settings(settings.limit)
        with seeded():
            self.tasks = {name: load_tasks([name], texts) for name in settings.tasks}
        # What cannot work shows now, not at the end of a long run.
        sampled = isinstance(self.scorer, StateScorer)
        for tasks in self.tasks.values():
            set_examples(tasks, settings.num_fewshot)
            for name, task in tasks["tasks"].items():
                self.model.check_task(name, task, sampled=sampled)

    def due(self, step: int) -> bool:
        every = self.config.eval.every
        last = step == self.config.train.num_steps
        return bool(self.tasks) and (last or bool(every and step % every == 0))

    def run(self, state: CheckpointState) -> dict[str, float]:
        """``eval/TASK/METRIC`` by name; every result is written to ``RUN/evals`` as well."""
        self.engine.backend.gather_weights()
        settings, found = self.config.eval, dict[str, float]()
        for tasks in self.tasks.values():
            self.model.cut = 0
            results = evaluate_tasks(
                self.model,
                tasks,
                limit=settings.limit,
                num_fewshot=settings.num_fewshot,
                bootstrap_samples=0,
            )
            for each, result in results.items():
                for metric, value in result["scores"].items():
                    found[f"eval/{each}/{metric}"] = float(value)
                self._write(each, result, state)
        return found

    def _write(self, name: str, result: dict[str, Any], state: CheckpointState) -> None:
        if not is_main_process():
            return
        directory = Path(self.config.run_directory) / "evals"
        directory.mkdir(exist_ok=True)
        about = {
            **self.model.settings(),
            "step": state.step,
            "tokens_trained": state.tokens,
            "precision": self.config.train.precision,
        }
        path = directory / f"{name}-{checkpoint_name(state.step)}-in-training.json"
        write_json(path, {**result, **about})


def make_scorer(config: RunConfig, engine: Engine, tokenizer: Tokenizer) -> Scorer:
    """By states where a process and its tensor-parallel peers have the model whole and need nobody
    else to run it; by the schedule of training elsewhere."""
    parallel, tokens = config.parallel, config.eval.tokens_per_pass
    alone = parallel.pipeline == parallel.expert == 1 and parallel.zero_stage < 3
    if alone and not (parallel.sequence and parallel.tensor > 1):
        return StateScorer(engine.parts[0], tokenizer.vocab_size, tokens_per_pass=tokens)
    return ScheduleScorer(
        engine,
        tokenizer.vocab_size,
        filler=tokenizer.eod_id,
        tokens_per_pass=tokens,
        multiple=parallel.tensor,
    )
