"""The training loop."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from pretrain.checkpoint.state import (
    CheckpointState,
    check_files,
    find_checkpoint,
    load_checkpoint,
    read_state,
)
from pretrain.checkpoint.writer import CheckpointWriter
from pretrain.common.errors import EXIT_STOPPED, UserError
from pretrain.common.files import write_bytes, write_json
from pretrain.config import RunConfig, legacy, to_yaml
from pretrain.config.checks import check_layout, check_run_config, check_vocab_size
from pretrain.data.batches import (
    Batch,
    PreparedData,
    TrainingBatches,
    open_data,
    share_of,
    validation_batches,
)
from pretrain.inference.generate import generate
from pretrain.model.build import build_stages, padded_vocab_size
from pretrain.model.counts import ModelCounts, count_model
from pretrain.model.spec import with_sizes
from pretrain.ops.shared.backends import describe_backends
from pretrain.optim.backends.deepspeed import shard_parameters
from pretrain.optim.schedule import learning_rate
from pretrain.parallel.processes import (
    all_reduce_metrics,
    any_process,
    data_parallel_rank_and_size,
    first_of_pipeline,
    is_main_process,
    on_every_process,
    on_main_process,
    start_processes,
    world_size,
)
from pretrain.parallel.watchdog import Watchdog
from pretrain.training.engine import Engine
from pretrain.training.environment import describe_environment
from pretrain.training.initialization import initialize_from
from pretrain.training.metrics import (
    LayerMetrics,
    RunLog,
    peak_flops,
    peak_memory_bytes,
    plot_loss_curve,
)
from pretrain.training.resuming import checkpoint_to_resume, last_checkpoint
from pretrain.training.run_control import Interval, RunLock, StopSignals, log_seconds, seed_step
from pretrain.training.spikes import SpikeDetector, roll_back

if TYPE_CHECKING:
    from evals.harness.in_loop import InLoopEvaluation

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
_MAX_SKIPS = 20
EXIT_DONE, EXIT_NONFINITE = 0, 3


def train(config: RunConfig, config_path: str) -> int:
    """Run, or go on with, a training run. Returns the exit status.

    0: the budget is done; 75: a signal stopped it, saved, start again to go on; 3: a loss or
    gradient was not finite and ``train.nonfinite`` is ``stop``.
    """
    legacy.keep_saved_sizes(config, config.run_directory)
    config.model = with_sizes(config.model, config_path)
    check_run_config(config, config_path)
    check_layout(config, world_size(), config_path)
    start_processes(config.parallel)
    with Watchdog(60 * config.parallel.timeout_minutes, config.run_directory) as watchdog:
        return _train(config, config_path, watchdog)


def _train(config: RunConfig, config_path: str, watchdog: Watchdog) -> int:
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    directory, settings = config.run_directory, config.train
    data = open_data(config.data)
    micro_batch_size = config.parallel.micro_batch_size
    batches = TrainingBatches(data, settings, micro_batch_size, config.seed)
    valid = validation_batches(data, settings, micro_batch_size, config.validation.tokens)
    vocab_size = padded_vocab_size(config.model, data.tokenizer.vocab_size)
    check_vocab_size(config, data.tokenizer.vocab_size, config_path)
    counts = count_model(config.model, vocab_size, settings.seq_len)
    lock = RunLock(directory)
    on_main_process(lock.take)
    found = on_main_process(lambda: checkpoint_to_resume(config, data, vocab_size))
    if found is not None and config.checkpoint.verify == "sha256":
        watchdog.at("checking the checkpoint")
        own_share = dist.get_rank(), world_size()
        on_every_process(lambda: check_files(found, "sha256", *own_share))
        watchdog.at("starting")
    stages = build_stages(
        config.model,
        vocab_size,
        seed=config.seed,
        seq_len=settings.seq_len,
        dtype=DTYPES[settings.precision],
        activation_checkpointing=settings.activation_checkpointing,
        sequence_parallel=config.parallel.sequence,
        filled=_divide_at_once(config, found),
    )
    if config.initialize is not None and found is None:
        initialize_from(stages, config.initialize, data.tokenizer.sha256)
    tokens_at_once = settings.seq_len * micro_batch_size * data_parallel_rank_and_size()[1]
    engine = Engine(
        stages, config.optimizer, config.parallel, settings.global_batch_tokens // tokens_at_once
    )
    state = CheckpointState(
        step=0,
        tokens=0,
        seed=config.seed,
        skipped=0,
        vocab_size=vocab_size,
        precision=settings.precision,
        tokenizer_sha256=data.tokenizer.sha256,
        data=data.identity,
        model=dataclasses.asdict(config.model),
    )
    if found is not None:
        load_checkpoint(found, engine)
        saved = read_state(found)
        state = dataclasses.replace(
            state,
            step=saved.step,
            tokens=saved.tokens,
            skipped=saved.skipped,
            data_offset=saved.data_offset,
            rollbacks=saved.rollbacks,
            recent_losses=saved.recent_losses,
        )
    if is_main_process():
        write_bytes(directory / "config.yaml", to_yaml(config).encode())
        write_json(directory / "environment.json", describe_environment())
        # For who reads the run later: scaling laws, reports.
        write_json(
            directory / "model.json",
            {
                "parameters": counts.parameters,
                "embedding_parameters": counts.embedding_parameters,
                "training_flops_per_token": counts.training_flops(),
                "vocab_size": vocab_size,
            },
        )

    log = RunLog(
        directory,
        config.logging,
        active=is_main_process(),
        num_steps=settings.num_steps,
        step=state.step,
    )
    try:
        log.say(
            f"{config.name}: {counts.parameters:,} parameters "
            f"({counts.embedding_parameters:,} in embeddings), "
            f"{counts.training_flops() / 1e6:,.1f} MFLOP per token, "
            f"{settings.num_steps:,} steps of {settings.global_batch_tokens:,} tokens, "
            f"{settings.precision}, {config.parallel.describe(world_size())} on "
            f"{'GPU' if torch.cuda.is_available() else 'CPU'}"
        )
        log.say(describe_backends(DTYPES[settings.precision]))
        if found is not None:
            log.say(f"resumed from {found}")
        if not valid:
            log.say(
                f"no validation: no source has {settings.seq_len + 1} tokens of validation text"
            )
        evaluation = _evaluation(config, engine, data, watchdog)
        with StopSignals() as stop:
            return _loop(
                config, engine, batches, valid, data, state, counts, log, stop, watchdog, evaluation
            )
    finally:
        log.close()
        lock.release()


def _divide_at_once(config: RunConfig, found: Path | None) -> Callable[[nn.Module], None] | None:
    """ZeRO-3 has no process hold the whole model, unless it is filled from another checkpoint."""
    if config.parallel.zero_stage < 3 or (config.initialize is not None and found is None):
        return None
    return shard_parameters


def _loop(
    config: RunConfig,
    engine: Engine,
    batches: TrainingBatches,
    valid: list[Batch],
    data: PreparedData,
    state: CheckpointState,
    counts: ModelCounts,
    log: RunLog,
    stop: StopSignals,
    watchdog: Watchdog,
    evaluation: InLoopEvaluation | None,
) -> int:
    settings, directory = config.train, config.run_directory
    rank, size = data_parallel_rank_and_size()
    checkpoints, num_steps = directory / "checkpoints", settings.num_steps
    total_tokens = settings.tokens_before(num_steps)
    writer = CheckpointWriter(checkpoints, config, data.tokenizer.path)
    bytes_per_token, own_valid = _bytes_per_token(data, log), share_of(valid, rank, size)
    peak = peak_flops(settings.precision)
    interval, layer_metrics = Interval(), LayerMetrics()
    detector = SpikeDetector(settings.spikes, state.recent_losses)
    skip_if = detector.is_spike if settings.spikes.policy == "skip" else None
    first_step, skips_in_a_row = state.step, 0

    while state.step < num_steps:
        step = state.step
        seed_step(config.seed, step)
        engine.begin_step(config.seed, step, rank, size)
        lr = learning_rate(config.schedule, config.optimizer.lr, step, num_steps)
        watchdog.at(f"reading the data of step {step + 1}")
        own_batches = batches.micro_batches(step, rank, size, offset=state.data_offset)
        watchdog.at(f"step {step + 1}")
        result = engine.train_step(own_batches, lr, skip_if)
        state.step += 1
        state.tokens += settings.batch_tokens(step)
        interval.count(settings.batch_tokens(step))
        spike = math.isfinite(result.loss) and detector.is_spike(result.loss)
        if spike and settings.spikes.policy == "rollback":
            watchdog.at(f"rolling back from step {state.step}")
            with interval.paused():
                status = _roll_back(config, engine, writer, state, log, result.loss)
            if status is not None:
                return status
            if state.step <= step:
                continue
        elif math.isfinite(result.loss):
            detector.add(result.loss)
        if result.applied:
            skips_in_a_row = 0
        elif spike:
            state.skipped += 1
            log.record(
                {
                    "step": state.step,
                    "tokens": state.tokens,
                    "skipped": state.skipped,
                    "spike": result.loss,
                }
            )
            log.say(
                f"step {state.step}: loss {result.loss:.4f} is a spike, left out "
                f"({state.skipped} steps so far)"
            )
        else:
            state.skipped += 1
            log.record({"step": state.step, "tokens": state.tokens, "skipped": state.skipped})
            skips_in_a_row += 1
            if settings.nonfinite == "stop" or skips_in_a_row == _MAX_SKIPS:
                writer.wait()  # what is being written shall be
            if settings.nonfinite == "stop":
                log.say(
                    f"step {state.step}: loss {result.loss}, gradient norm {result.grad_norm}: not "
                    f"finite, stopped without updating (train.nonfinite=skip goes on past it); "
                    f"{last_checkpoint(checkpoints)}"
                )
                return EXIT_NONFINITE
            log.say(f"step {state.step}: not finite, skipped ({state.skipped} so far)")
            if skips_in_a_row == _MAX_SKIPS:
                log.say(
                    f"{_MAX_SKIPS} steps in a row were not finite, stopped; "
                    f"{last_checkpoint(checkpoints)}"
                )
                return EXIT_NONFINITE
        if result.applied and (state.step % config.logging.every == 0 or state.step == num_steps):
            speed = interval.tokens_per_second()
            layer_metrics.collect(engine)
            own = {**layer_metrics.take(), "memory_max": peak_memory_bytes()}
            layers = all_reduce_metrics(own)
            memory = int(layers.pop("memory_max"))
            loop = first_of_pipeline(engine.recursion_metrics())
            flops = counts.training_flops(loop.get("recurrences"))
            shares = {"mfu": flops}
            if settings.activation_checkpointing == "block":
                shares["hfu"] = counts.hardware_flops(loop.get("recurrences"))
            if layers.get("newton_fallbacks"):
                log.say(
                    f"step {state.step}: Newton's method did not converge on "
                    f"{layers['newton_fallbacks']:g} sequences, which were computed step by step"
                )
            log.step(
                {
                    "step": state.step,
                    "tokens": state.tokens,
                    "loss": result.loss,
                    "lr": lr,
                    "grad_norm": result.grad_norm,
                    "tokens_per_second": speed,
                    **{k: peak and v * speed / (peak * world_size()) for k, v in shares.items()},
                    "memory": memory,
                    "skipped": state.skipped,
                    "epochs": max(batches.epochs(state.step, offset=state.data_offset)),
                    "seconds": log_seconds(),
                    **loop,
                    **layers,
                },
                seconds_left=(total_tokens - state.tokens) / speed,
            )

        stopping = any_process(stop.received)
        due = config.validation.every and state.step % config.validation.every == 0
        if valid and ((due and not stopping) or state.step == num_steps):
            layer_metrics.collect(engine)
            watchdog.at(f"validating step {state.step}")
            with interval.paused():
                _validate(engine, own_valid, bytes_per_token, state, log)
            engine.layer_metrics()  # validation's are not training's
        if state.step % config.checkpoint.every == 0 or stopping or state.step == num_steps:
            with interval.paused():
                watchdog.at(f"saving step {state.step}")
                writer.save(engine, state)
        writer.check()
        if evaluation is not None and evaluation.due(state.step) and not stopping:
            # After the save: an evaluation that fails, or is stopped, costs no training.
            layer_metrics.collect(engine)
            watchdog.at(f"evaluating step {state.step}")
            with interval.paused():
                _evaluate(evaluation, state, log)
            engine.layer_metrics()
        if stopping and state.step < num_steps:
            log.say(
                f"stopped by {stop.name} after step {state.step}, saved {writer.wait()}; run "
                "the same command again to go on"
            )
            return EXIT_STOPPED

    watchdog.at("finishing")
    writer.wait()
    engine.backend.gather_weights()  # for a sample, which one process makes alone

    if first_step >= num_steps:
        log.say(f"nothing to do: all {num_steps} steps are done")
    _finish(config, engine, data, log, stop)
    return EXIT_DONE


def _roll_back(
    config: RunConfig,
    engine: Engine,
    writer: CheckpointWriter,
    state: CheckpointState,
    log: RunLog,
    loss: float,
) -> int | None:
    """Back to before a spike, with other data; the exit status where that has been too often."""
    spike, spikes = state.step, config.train.spikes
    writer.wait()
    log.say(
        f"step {spike}: loss {loss:.4f} is a spike above {min(state.recent_losses):.4f} to "
        f"{max(state.recent_losses):.4f}"
    )
    if state.rollbacks == spikes.most:
        log.say(
            f"rolled back {spikes.most} times already (train.spikes.most), stopped; "
            f"{last_checkpoint(writer.directory)}"
        )
        return EXIT_NONFINITE
    found = roll_back(config, engine, writer.directory, state)
    if found is None:
        log.say(f"no checkpoint is {spikes.rollback_steps} steps older; going on")
        state.recent_losses.append(loss)
        del state.recent_losses[: -spikes.window]
        return None
    writer.save(engine, state)  # so that whatever comes, the data is left out
    log.rewind(state.step)
    log.record(
        {
            "step": state.step,
            "tokens": state.tokens,
            "rolled_back_from": spike,
            "data_offset": state.data_offset,
        }
    )
    log.say(
        f"rolled back to step {state.step}, leaving out the data up to the spike and of "
        f"{spikes.skip_steps} steps more"
    )
    return None


def _finish(
    config: RunConfig, engine: Engine, data: PreparedData, log: RunLog, stop: StopSignals
) -> None:
    """The loss curve, a sample, and where to go from here."""
    directory = config.run_directory
    if not is_main_process():
        return
    curve = plot_loss_curve(directory, config.name, data.bigram_entropy)
    if config.sample.tokens and config.parallel.one_has_all:
        prompt = [data.tokenizer.eod_id, *data.tokenizer.encode(config.sample.prompt)]
        ids = generate(
            engine.parts[0],
            prompt,
            max_tokens=config.sample.tokens,
            temperature=config.sample.temperature,
            seed=config.seed,
            vocab_size=data.tokenizer.vocab_size,
            stop_id=data.tokenizer.eod_id,
        )
        written = itertools.takewhile(lambda _: not stop.received, ids)
        text = data.tokenizer.decode([*prompt, *written])
        log.say("a sample of what it writes:\n" + "\n".join(f"  | {x}" for x in text.splitlines()))
    log.say(f"loss curve   {curve}")
    log.say(f"checkpoint   {find_checkpoint(directory)}")
    budget = {"steps": config.train.steps, "tokens": config.train.tokens}
    twice = next(f"train.{unit}={2 * amount}" for unit, amount in budget.items() if amount)
    log.say(f"resume       the same command; with {twice} it goes on for as long again")
    log.say(
        "next         "
        + "\n             ".join(
            [
                f"python -m evals {directory}",
                f"python -m data_prep inspect {config.data.path or config.data.blend[0].path}",
                f"cat {directory / 'metrics.jsonl'}",
            ]
        )
    )


def _validate(
    engine: Engine, batches: list[Batch], bytes_per_token: Any, state: CheckpointState, log: RunLog
) -> None:
    loss, count, text_bytes = engine.validate(batches, bytes_per_token)
    bits = loss * count / math.log(2) / text_bytes if text_bytes else None
    log.record(
        {
            "step": state.step,
            "tokens": state.tokens,
            "valid_loss": loss,
            "valid_tokens": count,
            "valid_bits_per_byte": bits,
        }
    )
    shown = "" if bits is None else f", {bits:.4f} bits per byte"
    log.say(f"step {state.step}: validation loss {loss:.4f} nats per token{shown}")


def _evaluation(
    config: RunConfig, engine: Engine, data: PreparedData, watchdog: Watchdog
) -> InLoopEvaluation | None:
    if not config.eval.tasks:
        return None
    from evals.tasks.loading import require_harness

    require_harness()
    from evals.harness.in_loop import InLoopEvaluation

    watchdog.at("loading the tasks of eval")
    return InLoopEvaluation(config, engine, data.tokenizer, alive=watchdog.moving)


def _evaluate(evaluation: InLoopEvaluation, state: CheckpointState, log: RunLog) -> None:
    found = evaluation.run(state)
    log.record({"step": state.step, "tokens": state.tokens, **found})
    shown = ", ".join(f"{k.removeprefix('eval/')} {v:.4f}" for k, v in found.items())
    log.say(f"step {state.step}: {shown}")


def _bytes_per_token(data: PreparedData, log: RunLog) -> torch.Tensor | None:
    try:
        return torch.from_numpy(data.tokenizer.bytes_per_token())
    except UserError as error:
        log.say(f"no bits per byte: {error}")
        return None
