"""Evaluation while a run trains, on its own processes under whatever layout they have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evals.tasks.loading import load_tasks, require_harness
from pretrain.checkpoint_folders import checkpoint_name
from pretrain.common.errors import UserError
from pretrain.common.files import file_name, write_json
from pretrain.config import RunConfig
from pretrain.data.tokenizer import Tokenizer
from pretrain.inference.score import Scorer, StateScorer
from pretrain.parallel.processes import is_main_process
from pretrain.training.callbacks import Callback
from pretrain.training.engine import Engine

if TYPE_CHECKING:
    from evals.harness.model import HarnessModel


class InLoopEvaluation(Callback):
    """Evaluation of the tasks of ``eval`` every ``eval.every`` steps, and after the last one.

    Every process loads the same tasks and gets the same scores; the weights, their optimizer and
    all random numbers stay as they are. Raises UserError, before the first step, for tasks that do
    not exist or whose data is missing.
    """

    def on_train_start(self) -> None:
        """Load the tasks, and the scorer of the model in training."""
        require_harness()
        self.trainer.announce("loading the tasks of eval")
        config, tokenizer = self.trainer.config, self.trainer.data.tokenizer
        scorer = make_scorer(config, self.trainer.engine, tokenizer)
        scorer.alive = self.trainer.report_progress
        self._model, self._tasks = _load(config, scorer, tokenizer)

    def on_resume(self) -> None:
        """Evaluate what was due and has no result, because a signal or a kill came before it."""
        measured = self.trainer.measured() if self._due() else set()
        done = {name.split("/")[1] for name in measured if name.startswith("eval/")}
        missing = {n: t for n, t in self._tasks.items() if not done >= t["tasks"].keys()}
        if self._due() and missing:
            self._evaluate(missing)

    def between_steps(self) -> None:
        """Evaluate if it is due; where the run is about to stop, it does so when it resumes."""
        if self._due() and not self.trainer.stopping:
            self._evaluate(self._tasks)

    def _due(self) -> bool:
        step, every = self.trainer.state.step, self.trainer.config.eval.every
        return step >= self.trainer.num_steps or (every > 0 and step % every == 0)

    def _evaluate(self, loaded: dict[str, dict[str, Any]]) -> None:
        """Log ``eval/TASK/METRIC``, and write every result into the run directory."""
        with self.trainer.evaluating(f"evaluating step {self.trainer.state.step}"):
            self._evaluate_tasks(loaded)

    def _evaluate_tasks(self, loaded: dict[str, dict[str, Any]]) -> None:
        from evals.harness.evaluation import evaluate_tasks

        trainer, state = self.trainer, self.trainer.state
        trainer.engine.backend.gather_weights()
        settings, found = trainer.config.eval, dict[str, float]()
        for tasks in loaded.values():
            self._model.cut = 0
            results = evaluate_tasks(
                self._model,
                tasks,
                limit=settings.limit,
                num_fewshot=settings.num_fewshot,
                bootstrap_samples=0,
            )
            for name, result in results.items():
                for metric, value in result["scores"].items():
                    found[f"eval/{name}/{metric}"] = float(value)
                self._write(name, result)
        trainer.log.record({"step": state.step, "tokens": state.tokens, **found})
        shown = ", ".join(f"{k.removeprefix('eval/')} {v:.4f}" for k, v in found.items())
        trainer.log.say(f"step {state.step}: {shown}")

    def _write(self, name: str, result: dict[str, Any]) -> None:
        if not is_main_process():
            return
        state, directory = self.trainer.state, self.trainer.run_directory.evals
        directory.mkdir(exist_ok=True)
        about = {
            **self._model.settings(),
            "step": state.step,
            "tokens_trained": state.tokens,
            "precision": self.trainer.config.train.precision,
        }
        path = directory / f"{file_name(name)}-{checkpoint_name(state.step)}-in-training.json"
        write_json(path, {**result, **about})


def _load(
    config: RunConfig, scorer: Scorer, tokenizer: Tokenizer
) -> tuple[HarnessModel, dict[str, dict[str, Any]]]:
    """Return lm-eval's view of the model, and the tasks by the names that ``eval`` gives them."""
    from evals.harness.evaluation import seeded, set_examples
    from evals.harness.model import HarnessModel

    settings = config.eval
    for name in settings.tasks:
        if name in ("perplexity", "positions"):
            raise UserError(
                f"eval.tasks names '{name}', which scores checkpoints alone: python -m evals RUN "
                f"--tasks {name}; the loss on held-out text is 'validation' here"
            )
    length = settings.max_length or config.train.seq_len
    model = HarnessModel(
        scorer, tokenizer, length, bos=settings.bos, length_option="eval.max_length="
    )
    texts = model.text_settings(settings.limit)
    with seeded():
        loaded = {name: load_tasks([name], texts) for name in settings.tasks}
    # What cannot work shows now, not at the end of a long run.
    sampled = isinstance(scorer, StateScorer)
    for tasks in loaded.values():
        set_examples(tasks, settings.num_fewshot)
        for name, task in tasks["tasks"].items():
            model.check_task(name, task, sampled=sampled)
    return model, loaded


def make_scorer(config: RunConfig, engine: Engine, tokenizer: Tokenizer) -> Scorer:
    """Return a StateScorer where a process and its tensor-parallel peers can run the full model.

    Elsewhere return a ScheduleScorer, which scores by the schedule of training.
    """
    from evals.harness.schedule_scoring import ScheduleScorer

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
