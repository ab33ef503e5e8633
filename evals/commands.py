"""The commands ``python -m evals CHECKPOINT --tasks ...`` and ``python -m evals tasks``."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals.exit_options import add_options as add_exit_options
from evals.exit_options import exit_rule, given_exits
from evals.exit_options import mark as exit_mark
from evals.mitigations import add_options, apply_options, given_options
from evals.mitigations import mark as state_mark
from evals.tables import show_perplexity, show_positions, show_scores, show_tasks
from pretrain.common.argument_types import count, positive
from pretrain.common.errors import UserError
from pretrain.common.files import file_name, write_json
from pretrain.common.outputs import check_folder
from pretrain.run_directory import RunDirectory

HELD_OUT = ("perplexity", "positions")  # scored on the run's own validation text
HF = "hf:"


def main(arguments: Sequence[str]) -> int:
    """Score a checkpoint on the tasks that ``arguments`` name, and write a JSON file for each."""
    given = _parser().parse_args(arguments)
    names = list(dict.fromkeys(name for name in given.tasks.split(",") if name))
    if not names:
        raise UserError("--tasks is empty; 'python -m evals tasks' lists the available tasks")
    harness = [name for name in names if name not in HELD_OUT]
    if harness:  # before a model is loaded, so that a wrong name is reported at once
        from evals.tasks.loading import check_tasks

        check_tasks(harness)
    if given.checkpoint.startswith(HF):
        if len(harness) < len(names):
            raise UserError(
                f"{', '.join(n for n in names if n in HELD_OUT)} is scored on a run's own "
                f"validation text, which {given.checkpoint} does not have"
            )
        return _score_hugging_face(given, harness)
    from pretrain.common.dtypes import DTYPES
    from pretrain.inference.load import load_model
    from pretrain.parallel.processes import stop_processes

    averaged, exits = given.weights == "ema", given_exits(given)
    rule = exit_rule(exits)
    if rule is not None and "positions" in names:
        raise UserError(f"positions is scored with all passes, but --exit is {rule}")
    loaded = load_model(
        given.checkpoint,
        recurrences=given.recurrences,
        averaged=averaged,
        exits=rule,
        dtype=DTYPES[given.precision],
    )
    extra: dict[str, Any] = {} if given.precision == "float32" else {"precision": given.precision}
    if given.recurrences is not None:
        extra["recurrences"] = given.recurrences
    if averaged:
        extra["weights"] = "ema"
    if given.layer_path is not None:
        from pretrain.inference.layer_paths import parse_path, path_text, set_path

        path = parse_path(given.layer_path, len(loaded.model.blocks))
        set_path(loaded.model, path)
        extra["layer_path"] = path_text(path)
    mitigations = given_options(given)
    apply_options(loaded, mitigations, given.data)
    extra.update(mitigations)
    extra.update(exits)
    for name in (n for n in names if n in HELD_OUT):
        _score_held_out(name, loaded, given, extra)
    if harness:
        from evals.harness.checkpoint_evaluation import evaluate_checkpoint

        usual = "document" if loaded.imported is None else "model"
        bos = given.bos or usual
        check_folder(loaded.evals_directory, "the folder for results")
        found = evaluate_checkpoint(
            loaded,
            harness,
            limit=given.limit,
            num_fewshot=given.num_fewshot,
            bos=bos,
            max_length=given.max_length,
            tokens_per_pass=given.tokens_per_pass,
        )
        options = (given.limit, given.num_fewshot, bos, given.max_length, given.precision)
        defaults = (None, None, usual, None, "float32")
        mark = _mark(extra, options if options != defaults else ())
        results, paths = {}, []
        for name, result in found:
            results[name] = result
            paths.append(
                _write(
                    loaded.evals_directory, f"{name}-{loaded.checkpoint.name}{mark}", result, extra
                )
            )
        show_scores(str(loaded.checkpoint), results, paths)
    stop_processes()
    return 0


def _score_held_out(name: str, loaded: Any, given: argparse.Namespace, extra: Any) -> None:
    directory, checkpoint = loaded.evals_directory, loaded.checkpoint.name
    check_folder(directory, "the folder for results")
    if name == "positions":
        from evals.positions import draw_positions, evaluate_positions

        factor, sequences = given.factor or 16, given.sequences or 8
        result = evaluate_positions(loaded, data=given.data, factor=factor, sequences=sequences)
        mark = _mark(extra, (given.data, given.factor, given.sequences))
        path = _write(directory, f"{name}-{checkpoint}{mark}", result, extra)
        show_positions(result, path, draw_positions(result, path.with_suffix(".png")))
        return
    from evals.perplexity import evaluate_perplexity

    result = evaluate_perplexity(
        loaded,
        data=given.data,
        window=given.window,
        stride=given.stride,
        carry_state=given.carry_state,
        training_windows=given.training_windows,
        max_tokens=given.max_tokens,
        seed=given.seed,
    )
    settings = (given.data, given.window, given.stride, given.max_tokens)
    others = [n for n in ("carry_state", "training_windows", "seed") if getattr(given, n)]
    mark = _mark(extra, (*settings, *((n, getattr(given, n)) for n in others)))
    show_perplexity(result, _write(directory, f"{name}-{checkpoint}{mark}", result, extra))


def _score_hugging_face(given: argparse.Namespace, names: Sequence[str]) -> int:
    from evals.harness.hugging_face import evaluate_hugging_face

    source = given.checkpoint.removeprefix(HF)
    own = ("bos", "weights", "recurrences", "layer_path")
    for option in (*own, *given_exits(given), *given_options(given)):
        value = getattr(given, option)
        if value != _parser().get_default(option):
            raise UserError(
                f"--{option.replace('_', '-')} is {value}, but this option is only for "
                f"checkpoints of runs; {given.checkpoint} is evaluated as its tokenizer and "
                "weights define it"
            )
    found = evaluate_hugging_face(
        source,
        names,
        limit=given.limit,
        num_fewshot=given.num_fewshot,
        max_length=given.max_length,
        precision=given.precision,
        trust_remote_code=given.trust_remote_code,
    )
    settings = (given.limit, given.num_fewshot, given.max_length, given.precision)
    mark = _mark({}, settings)
    directory = RunDirectory(Path("runs") / f"hf-{file_name(source.rstrip('/'))}").evals
    results, paths = {}, []
    for name, result in found:
        results[name] = result
        paths.append(_write(directory, f"{name}{mark}", result, {}))
    show_scores(given.checkpoint, results, paths)
    return 0


def _mark(extra: dict[str, Any], options: tuple[Any, ...]) -> str:
    """Return a suffix for the file's name that depends on the settings, "" for the defaults."""
    mark = "-ema" if "weights" in extra else ""
    mark += f"-{extra['precision']}" if "precision" in extra else ""
    if "recurrences" in extra:
        mark += f"-recurrences-{extra['recurrences']}"
    mark += f"-path-{extra['layer_path']}" if "layer_path" in extra else ""
    mark += exit_mark(extra)
    mark += state_mark({name: extra[name] for name in extra if name.startswith("state_")})
    if any(options):
        mark += "-" + hashlib.sha256(repr(options).encode()).hexdigest()[:8]
    return mark


def _write(directory: Path, name: str, result: dict[str, Any], extra: dict[str, Any]) -> Path:
    path = directory / f"{file_name(name)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result.update(extra)
    write_json(path, result)
    return path


def list_tasks(arguments: Sequence[str]) -> int:
    """Print the tasks that need no network."""
    argparse.ArgumentParser(
        prog="python -m evals tasks", description="List the tasks that need no network."
    ).parse_args(arguments)
    from evals.tasks.loading import bundled_tasks

    show_tasks({"held-out text of the run": list(HELD_OUT), **bundled_tasks()})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evals",
        description="Score a checkpoint. 'python -m evals tasks' lists tasks, 'sample' continues a "
        "text and 'chat' does so turn by turn, 'exits' scores depths of recursive models, 'layers' "
        "ranks attention layers by what converting them costs, 'paths' searches layer paths, "
        "'scaling' fits scaling laws to runs, 'report' writes a page about runs.",
    )
    parser.add_argument(
        "checkpoint",
        help="a run directory, one of its checkpoints/step-N, or hf:NAME for a Hugging Face model "
        "by name or folder",
    )
    parser.add_argument(
        "--tasks",
        default="perplexity",
        help=f"comma-separated: {', '.join(HELD_OUT)}, or any task of 'python -m evals tasks' or "
        "of lm-eval (perplexity)",
    )
    parser.add_argument(
        "--recurrences",
        type=positive,
        help="passes through the loop of a recursive model (the configured number)",
    )
    parser.add_argument(
        "--layer-path",
        metavar="BLOCKS",
        help="the blocks to run, in order, such as 0-3,2-3,5 (all of them once)",
    )
    parser.add_argument(
        "--weights",
        choices=("last", "ema"),
        default="last",
        help="weights of the last step, or their average by optimizer.ema_decay (last)",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="hf:NAME: run the Python code that comes with the model",
    )
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    held_out = parser.add_argument_group("perplexity and positions")
    held_out.add_argument("--data", help="a prepared data directory (the run's)")
    held_out.add_argument("--window", type=positive, help="tokens per window (training length)")
    held_out.add_argument(
        "--stride", type=positive, help="tokens between windows (half the window)"
    )
    held_out.add_argument(
        "--carry-state", action="store_true", help="carry the mixers' states from window to window"
    )
    held_out.add_argument(
        "--training-windows",
        action="store_true",
        help="score the windows that validation in training scores, by their mean the same loss",
    )
    held_out.add_argument(
        "--max-tokens",
        type=positive,
        help="score a random sample of the windows, of about this many tokens (all)",
    )
    held_out.add_argument("--seed", type=count, help="of the sample (0)")
    held_out.add_argument(
        "--factor", type=positive, help="positions: sequence length / training length (16)"
    )
    held_out.add_argument("--sequences", type=positive, help="positions: number of sequences (8)")
    tasks = parser.add_argument_group("tasks of lm-eval")
    tasks.add_argument("--limit", type=positive, help="documents of each task (all)")
    tasks.add_argument("--num-fewshot", type=count, help="examples per prompt (the task's)")
    tasks.add_argument(
        "--max-length",
        type=positive,
        help="tokens per request; longer ones lose their beginning (training length)",
    )
    tasks.add_argument(
        "--bos",
        choices=("document", "none", "model"),
        help="begin requests with the end-of-document token, as in training, with nothing, or as "
        "an imported model's tokenizer does (imported models: model, others: document)",
    )
    tasks.add_argument(
        "--tokens-per-pass", type=positive, default=8192, help="tokens per forward pass (8192)"
    )
    add_exit_options(parser)
    add_options(parser)
    return parser
