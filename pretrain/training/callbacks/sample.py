"""The end of a complete run: a sample, the loss curve, and what can be done next."""

from __future__ import annotations

import copy
import itertools

from pretrain.config import RunConfig
from pretrain.config.branch import settle_branch
from pretrain.inference.generate import generate
from pretrain.parallel.processes import is_main_process
from pretrain.training.callbacks.base import Callback
from pretrain.training.loss_curve import plot_loss_curve
from pretrain.training.resuming import how_to_extend


class Sample(Callback):
    """Show a text that the model continues, where one process has all of the model."""

    def on_complete(self) -> None:
        """Generate on the main process and show the text."""
        trainer, config = self.trainer, self.trainer.config
        trainer.engine.backend.gather_weights()  # the main process generates alone
        wanted = config.sample.tokens > 0 and config.parallel.one_has_all
        if not (wanted and is_main_process()):
            return
        tokenizer = trainer.data.tokenizer
        prompt = [tokenizer.eod_id, *tokenizer.encode(config.sample.prompt)]
        ids = generate(
            trainer.engine.parts[0],
            prompt,
            max_tokens=config.sample.tokens,
            temperature=config.sample.temperature,
            seed=config.seed,
            vocab_size=tokenizer.vocab_size,
            stop_ids=(tokenizer.eod_id,),
        )
        written = itertools.takewhile(lambda _: not trainer.stop.received, ids)
        lines = tokenizer.decode([*prompt, *written]).splitlines()
        trainer.log.say("a sample of what it writes:\n" + "\n".join(f"  | {x}" for x in lines))


class Summary(Callback):
    """Draw the loss curve, and name the commands that come next."""

    def on_complete(self) -> None:
        """Draw and print on the main process."""
        if not is_main_process():
            return
        trainer, config, directory = self.trainer, self.trainer.config, self.trainer.run_directory
        log = trainer.log
        curve = plot_loss_curve(directory, config.name, trainer.data.bigram_entropy)
        log.say(f"wall time    {trainer.wall_time.describe()}")
        log.say(f"loss curve   {curve}")
        checkpoint = directory.last_checkpoint()
        log.say(f"checkpoint   {checkpoint}")
        longer, twice = _doubled(config)
        settle_branch(longer, config.name)
        needed = "" if checkpoint is None else how_to_extend(checkpoint, longer)
        log.say(f"resume       run the same command again; {twice}{needed} doubles the run")
        windows = "" if config.data.prefix is None else " --training-windows"
        commands = [
            f"python -m evals {directory}{windows}",
            f"python -m data_prep inspect {config.data.path or config.data.blend[0].path}",
            f"cat {directory.metrics_file}",
        ]
        log.say("next         " + "\n             ".join(commands))


def _doubled(config: RunConfig) -> tuple[RunConfig, str]:
    """Return the settings of a run twice as long that begins as this one, and what they change.

    Phases end where they did, of which shares of more tokens would be other places.
    """
    longer = copy.deepcopy(config)
    train = longer.train
    if config.train.steps is not None and not config.phases:
        train.steps = 2 * config.train.steps
        return longer, f"train.steps={train.steps}"
    total = config.train.tokens or config.plan.tokens
    train.steps, train.tokens = None, 2 * total
    changed = f"train.tokens={train.tokens}"
    if config.train.steps is not None:
        changed = f"train.steps=null {changed}"
    if not config.phases:
        return longer, changed
    ends = [config.plan.tokens_before(phase.last) for phase in config.plan.phases[:-1]]
    for phase, end in zip(longer.phases, [*ends, None], strict=True):
        phase.until, phase.until_tokens = None, end
    if [vars(phase) for phase in longer.phases] == [vars(phase) for phase in config.phases]:
        return longer, changed
    stay = f"until_tokens {', '.join(map(str, ends))} and none for the last"
    return longer, f"{changed} and the ends of phases where they are ({stay})"
