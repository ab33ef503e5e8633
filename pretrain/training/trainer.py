"""Training a run: from its settings to its last step."""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from pretrain.checkpoint.state import CheckpointState
from pretrain.checkpoint.teacher import count_run
from pretrain.checkpoint.writer import CheckpointWriter
from pretrain.common.config_loader import ConfigError
from pretrain.common.dtypes import DTYPES
from pretrain.common.errors import UserError
from pretrain.common.files import explain_write_error, is_refused_write
from pretrain.common.quiet import ignore_warnings
from pretrain.config import RunConfig, check_run_config, load_run_config
from pretrain.config.checks import check_callbacks
from pretrain.config.plan import RunPlan
from pretrain.data.batches import (
    PreparedData,
    TrainingBatches,
    open_data,
)
from pretrain.data.manifest import check_outside_data
from pretrain.model.counts import ModelCounts
from pretrain.model.float8 import count_projections
from pretrain.model.layout import check_layout
from pretrain.model.spec import check_model, with_sizes
from pretrain.ops.backends import describe_backends
from pretrain.ops.float8 import check_float8
from pretrain.parallel.processes import (
    any_process,
    data_parallel_rank_and_size,
    is_main_process,
    on_main_process,
    process_groups,
    world_size,
)
from pretrain.run_directory import RunDirectory
from pretrain.training.arguments import check_arguments
from pretrain.training.branching import (
    begins_from_trunk,
    describe_parent,
    note_parent,
    trunk_of,
)
from pretrain.training.callbacks import (
    Callback,
    Decision,
    as_callbacks,
    default_callbacks,
    load_callback,
)
from pretrain.training.engine import Engine, StepResult
from pretrain.training.log import RunLog
from pretrain.training.metrics import LayerMetrics
from pretrain.training.phases import history_of, open_phases, windows_of
from pretrain.training.preflight import epochs_of_sources, planned_time, preflight
from pretrain.training.read_ahead import ReadAhead
from pretrain.training.result import COMPLETED, NON_FINITE, STOPPED, TrainResult
from pretrain.training.resuming import checkpoint_to_resume, describe_changes, past_of
from pretrain.training.run_control import (
    Interval,
    StopSignals,
    kept_random_numbers,
    only_run,
    seed_step,
    threads_of_torch,
)
from pretrain.training.setup import (
    build_engine,
    check_data_hashes,
    check_hashes,
    describe_run,
    state_of,
    vocabulary_of,
)
from pretrain.training.teacher_cache import open_cache
from pretrain.training.wall_time import Kind, WallTime


class Trainer:
    """A trainer of one run, which it begins or resumes.

    ``config`` is a run's settings or the YAML file that has them, with ``overrides``, such as
    ``optimizer.lr=3e-4``, over the file's. ``callbacks`` come after the default ones and those that
    ``config.callbacks`` names; a string among them names a class, as there. ``force`` trains even
    where a check of what is likely to go wrong refuses, as ``--force`` does. Raises ConfigError for
    settings that cannot work.

    Several processes, as torchrun starts them, each make a Trainer of the same settings.
    """

    config: RunConfig
    run_directory: RunDirectory
    callbacks: list[Callback]
    force: bool
    plan: RunPlan
    """The phases of the run, and what each step is."""
    num_steps: int
    """Optimizer steps of the whole run."""

    # Set from on_train_start on:
    data: PreparedData
    phase_data: list[PreparedData]
    batches: TrainingBatches
    counts: ModelCounts
    engine: Engine
    state: CheckpointState
    """How far the run is; ``state.step`` is the number of the step that was done last."""
    log: RunLog
    writer: CheckpointWriter
    stop: StopSignals
    interval: Interval
    wall_time: WallTime
    """What this start's time is spent on."""
    layer_metrics: LayerMetrics

    # About the step that was done last:
    lr: float
    result: StepResult | None
    stopping: bool
    """Whether the run stops after this step, known between steps."""

    def __init__(
        self,
        config: RunConfig | str | Path,
        *,
        overrides: Sequence[str] = (),
        callbacks: Callback | Sequence[Callback | str] = (),
        force: bool = False,
    ):
        self._start, self.force = time.monotonic(), force
        check_arguments(config, overrides)
        if isinstance(config, RunConfig):
            if overrides:
                raise ConfigError(
                    f"overrides are {list(overrides)}, expected none beside a RunConfig: set its "
                    "fields"
                )
            self.config, self._where = copy.deepcopy(config), f"run '{config.name}'"
        else:
            self.config, self._where = load_run_config(config, overrides), str(config)
        self.run_directory = RunDirectory(self.config.run_directory)
        begun = trunk_of(self.config) if begins_from_trunk(self.config) else self.run_directory
        begun.keep_saved_sizes(self.config)
        self.config.model = with_sizes(self.config.model, self._where)
        check_run_config(self.config, self._where)
        check_model(self.config.model, self._where)
        self.plan = self.config.plan
        self.num_steps = self.plan.num_steps
        self.lr = 0.0
        self.stop = StopSignals()
        named = [load_callback(name, f"{self._where}: callbacks") for name in self.config.callbacks]
        own = as_callbacks(callbacks, "Trainer: callbacks")
        self.callbacks = [*default_callbacks(self.config), *named, *own]
        for callback in self.callbacks:
            callback.trainer = self
        self._skipping = [
            c for c in self.callbacks if type(c).skip_update is not Callback.skip_update
        ]
        check_callbacks([type(c).__name__ for c in self._skipping], self.config, self._where)

    def fit(self) -> TrainResult:
        """Train to the last step, and return how the run ended.

        Process groups that do not exist are made, and left at the end. Signals stop the run, which
        saves, where this is called on the main thread; :meth:`request_stop` does anywhere. Raises
        UserError for what cannot be used: data, checkpoint, layout, disk; and while another fit of
        this process goes on.
        """
        check_layout(self.config, world_size(), self._where)
        if self.config.train.precision == "fp8":
            check_float8()
        check_outside_data(self.run_directory.path, self._where)
        with only_run(str(self.run_directory)):
            self._start, self.result, self.stopping = time.monotonic(), None, False
            self.wall_time = WallTime(self._start)
            try:
                return self._fit()
            finally:
                self.stop = StopSignals()  # what stopped this call shall not stop the next

    def request_stop(self, reason: str) -> None:
        """Make the run save and stop after the current step, as a signal would; from any thread."""
        self.stop.request(reason)

    # For callbacks

    def announce(self, work: str) -> None:
        """Call ``on_work`` of every callback: what this process does from now on."""
        for callback in self.callbacks:
            callback.on_work(work)

    def report_progress(self) -> None:
        """Call ``on_progress`` of every callback: work which may take long advances."""
        for callback in self.callbacks:
            callback.on_progress()

    def measured(self) -> set[str]:
        """Return the names of what the metrics have of ``state.step``; every process must call."""
        return on_main_process(lambda: self.run_directory.measured_at(self.state.step))

    @contextlib.contextmanager
    def paused(self, work: str, kind: Kind = "other") -> Iterator[None]:
        """Do ``work`` whose time does not count as training's, but as ``kind``."""
        self.announce(work)
        with self.interval.paused(), self.wall_time.spent_on(kind):
            yield

    @contextlib.contextmanager
    def evaluating(self, work: str) -> Iterator[None]:
        """Do ``work`` that runs the model: neither its time nor its metrics are training's."""
        self.layer_metrics.collect(self.engine)
        with self.paused(work, "evaluate"):
            yield
        self.engine.layer_metrics()

    def forget_metrics(self) -> None:
        """Forget what layers have measured since the last line of the log: those steps are gone."""
        self.layer_metrics = LayerMetrics()
        self.engine.layer_metrics()
        self.engine.recursion_metrics()

    def seconds(self) -> float:
        """Return the seconds since :meth:`fit` was called."""
        return round(time.monotonic() - self._start, 3)

    # The run

    def _fit(self) -> TrainResult:
        """Set up what lasts as long as the run, train, and give all of it back."""
        with (
            warnings.catch_warnings(),
            process_groups(self.config.parallel),
            threads_of_torch(self.config.train.threads),
            kept_random_numbers(),
            contextlib.ExitStack() as stack,
        ):
            ignore_warnings()
            for callback in self.callbacks:
                callback.trainer = self  # another one may have had it meanwhile
            for callback in self.callbacks:
                stack.push(_on_exception(callback))
                callback.on_fit_start()
            result = self._run()
            for callback in self.callbacks:
                callback.on_fit_end(result)
            return result

    def _run(self) -> TrainResult:
        """Hold the run directory, prepare, and train."""
        config = self.config
        self.data = open_data(config.data)
        self.phase_data = open_phases(self.plan, config.data, self.data)
        if config.data.verify == "sha256":
            self.announce("checking the data")
            settings = [config.data, *(phase.config.data for phase in self.plan.phases)]
            check_data_hashes(settings, self.report_progress)
            self.announce("starting")
        self._order_data(None)
        vocab_size = vocabulary_of(config, self.data, self._where)
        config.model.vocab_size = vocab_size  # saved with the other sizes
        self.counts = count_run(config, vocab_size, config.train.seq_len)
        self._warnings = preflight(
            config, vocab_size, self.counts.parameters, self.batches, force=self.force
        )
        try:
            on_main_process(self.run_directory.take_lock)
            checkpoint = self._prepare(vocab_size)
            self.log = RunLog(
                self.run_directory,
                config.logging,
                active=is_main_process(),
                num_steps=self.num_steps,
                step=self.state.step,
                retries=config.checkpoint.retries,
            )
            self._ahead = ReadAhead(self.batches, self.num_steps)
            with contextlib.closing(self.log), self.stop, self._ahead:
                return self._train(checkpoint)
        except OSError as error:
            self.run_directory.check_held()
            if not is_refused_write(error):
                raise
            raise UserError(
                f"{explain_write_error(error, self.run_directory.path)}; "
                f"{self.run_directory.describe_last_checkpoint()}; run the same command again when "
                "files can be written"
            ) from None
        finally:
            self.run_directory.release_lock()

    def _order_data(self, past: tuple[int, list[dict[str, Any]]] | None) -> None:
        """Set the order of the data, which goes on from a checkpoint's ``past``."""
        windows = windows_of(self.plan, past)
        self.batches = TrainingBatches.of_run(self.plan, self.phase_data, windows, self.config.seed)
        self._history = history_of(self.plan, self.phase_data, windows)

    def _prepare(self, vocab_size: int) -> Path | None:
        """Build what trains, and return the checkpoint that it continues from."""
        config = self.config
        self._order_data(on_main_process(lambda: past_of(config)))
        checkpoint = on_main_process(
            lambda: checkpoint_to_resume(
                config, self.data, self._history, vocab_size, force=self.force
            )
        )
        if checkpoint is not None and config.checkpoint.verify == "sha256":
            self.announce("checking the checkpoint")
            check_hashes(checkpoint)
            self.announce("starting")
        self.engine = build_engine(config, self.data, vocab_size, checkpoint)
        self.state = state_of(config, self.data, self._history, vocab_size, checkpoint)
        self._cache = open_cache(config, self.plan, self.data, self._history)
        self.interval, self.layer_metrics = Interval(), LayerMetrics()
        if is_main_process():
            describe_run(self.run_directory, config, self.counts, vocab_size)
            if checkpoint is not None and begins_from_trunk(config):
                note_parent(self.run_directory, config, checkpoint)
        return checkpoint

    def _train(self, checkpoint: Path | None) -> TrainResult:
        self._say_what_trains(checkpoint)
        tokenizer = self.data.tokenizer.path
        self.writer = CheckpointWriter(
            self.run_directory.checkpoints,
            self.config,
            tokenizer,
            retries=self.config.checkpoint.retries,
            report=self.log.say,
        )
        try:
            status = self._train_with_callbacks()
        except BaseException:
            # Whoever catches this, even KeyboardInterrupt in a notebook, may start again at once:
            # nothing of this run writes then. With several processes the writer may wait for one
            # that is gone.
            if world_size() == 1:
                self.writer.abandon()
            raise
        self.writer.close()
        loss = None if self.result is None else self.result.loss
        return TrainResult(status, self.state.step, self.state.tokens, loss, self.run_directory)

    def _train_with_callbacks(self) -> str:
        for callback in self.callbacks:
            callback.on_train_start()
        self.interval = Interval()  # preparing is not training
        if self.state.step >= self.num_steps:
            self.log.say(f"no step left to do: all {self.num_steps} are done")
        if self.state.step > 0:
            for callback in self.callbacks:
                callback.on_resume()
        status = self._loop()
        if status == COMPLETED:
            for callback in self.callbacks:
                callback.on_complete()
        return status

    def _say_what_trains(self, checkpoint: Path | None) -> None:
        config, counts, train = self.config, self.counts, self.config.train
        sizes = {phase.config.train.global_batch_tokens: None for phase in self.plan.phases}
        batches = ", then ".join(f"{size:,}" for size in sizes)
        self.log.say(
            f"{config.name}: {counts.describe()}, "
            f"{counts.training_flops() / 1e6:,.1f} MFLOP per token, "
            f"{self.num_steps:,} steps of {batches} tokens, "
            f"{self._describe_precision()}, {config.parallel.describe(world_size())} on "
            f"{'GPU' if torch.cuda.is_available() else 'CPU'}"
        )
        self.log.say(describe_backends(DTYPES[train.precision]))
        self.log.say(epochs_of_sources(self.batches, self.num_steps))
        if self.log.active:
            self.log.say(self.batches.describe_packing())
        planned = None
        if self.log.active and config.model.vocab_size is not None:
            planned = planned_time(config, config.model.vocab_size)
        if planned is not None:
            self.log.say(planned)
        for warning in self._warnings:
            self.log.say(f"warning: {warning}")
        parent = self.run_directory.read_parent() if self.log.active else {}
        if parent:
            self.log.say(f"branch of {describe_parent(parent)}")
        if checkpoint is not None:
            damage = self.run_directory.damage_of_latest()
            if damage is not None and config.checkpoint.resume is None:
                self.log.say(f"{damage}; resuming from the checkpoint that was saved last")
            self.log.say(f"resumed from {checkpoint}")
            changes = describe_changes(checkpoint, config) if self.log.active else None
            if changes is not None:
                self.log.say(changes)

    def _describe_precision(self) -> str:
        precision = self.config.train.precision
        if precision != "fp8":
            return precision
        chosen, every = count_projections(self.config.model)
        emulated = "" if torch.cuda.is_available() else ", emulated"
        return f"fp8 in {chosen} of {every} projections{emulated}, else bf16"

    def _loop(self) -> str:
        """Train up to the last step, unless something ends the run; return its status."""
        self.wall_time.switch("other")
        while self.state.step < self.num_steps:
            for callback in self.callbacks:
                callback.before_step()
            result = self._train_step()
            decision = self._decide(result)
            if decision is Decision.GIVE_UP:
                return NON_FINITE
            if decision is Decision.ROLLED_BACK:
                continue
            with self.wall_time.spent_on("wait"):
                self.stopping = any_process(self.stop.received)
            for callback in self.callbacks:
                callback.between_steps()
            if self.stopping:  # after the last step too: what is due then is made up for later
                for callback in self.callbacks:
                    callback.on_stop()
                return STOPPED
        return COMPLETED

    def _train_step(self) -> StepResult:
        """Do the next step, and count it."""
        config, state, step = self.config, self.state, self.state.step
        rank, size = data_parallel_rank_and_size()
        seed_step(config.seed, step)
        self.engine.begin_step(config.seed, step, rank, size)
        self.lr = self.plan.learning_rate(step)
        self.announce(f"reading the data of step {step + 1}")
        with self.wall_time.spent_on("data"):
            local_batches = self._ahead.micro_batches(step, rank, size, offset=state.offset)
            if self._cache is not None:
                self._cache.add(local_batches, step, rank, size)
        self.announce(f"step {step + 1}")
        with self.wall_time.spent_on("train"):
            result = self.engine.train_step(local_batches, self.lr, self._skip_if())
        self.wall_time.count_step()
        tokens = self.plan.batch_tokens(step)
        state.step += 1
        state.tokens += tokens
        state.skipped += not result.applied
        state.aligned += result.applied and self.engine.backend.holding
        self.interval.count(tokens)
        self.result = result
        return result

    def _skip_if(self) -> Callable[[float], bool] | None:
        """Return what decides by a step's loss whether its update is skipped, if anything does."""
        if not self._skipping:
            return None

        def skips(loss: float) -> bool:
            answers = [callback.skip_update(loss) for callback in self._skipping]  # all see it
            return any(answers)

        return skips

    def _decide(self, result: StepResult) -> Decision | None:
        decision = None
        for callback in self.callbacks:
            decision = callback.after_step(result)
            if decision is not None:
                break
        for callback in self.callbacks:
            callback.after_decision(decision)
        return decision


def _on_exception(
    callback: Callback,
) -> Callable[[type[BaseException] | None, BaseException | None, TracebackType | None], None]:
    """Return an exit function of a context that has the callback see its exception."""

    def leave(
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            callback.on_exception(error)

    return leave
