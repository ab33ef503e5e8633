"""Settings of one model on one synthetic task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from evals.synthetic.algorithms import ELEMENTS, HINTS, SHORT, WINDOWS, digits_of
from evals.synthetic.rows import Options
from evals.synthetic.tasks import MQAR_KEYS, TASKS
from pretrain.common.config_loader import Config, ConfigError, OneOf, build_config, setting
from pretrain.config import ModelConfig

TEST_FACTORS = (1, 2, 4)
_OWN = ("pattern", "hidden_size", "mixers", "recursion", "init_std")


def _tasks() -> list[str]:
    return list(TASKS)


@dataclass
class SyntheticConfig(Config):
    """One model on one synthetic task."""

    pattern: str
    """The mixers of all blocks, as in ``model.pattern``."""
    task: Annotated[str, OneOf(_tasks)] = setting()
    """Name of the task."""
    mixers: dict[str, Any] = field(default_factory=dict)
    """Settings of mixers, as in ``model.mixers``."""
    hidden_size: int = setting(64, minimum=1)
    """The model's width."""
    mlp: str = setting("none")
    """The feed-forward network of every block, as in ``model.mlp.kind``."""
    recursion: dict[str, Any] | None = None
    """A loop over blocks, as in ``model.recursion``; null: none."""
    model_settings: dict[str, Any] = field(default_factory=dict)
    """Whatever else ``model`` has, such as ``block_norm`` or ``moe``."""
    init_std: float = setting(0.02, above=0)
    """Standard deviation of the Gaussian that matrices are initialised with."""
    length: int = setting(32, minimum=4)
    """Tokens of a training row, what opens it included."""
    curriculum: list[int] = field(default_factory=list)
    """Shorter lengths trained on first, each for as many steps as ``length`` itself."""
    tokens_per_pair: int = setting(8, minimum=4)
    """Tokens of a row for each pair of ``mqar``, at every length."""
    window: int = setting(2, minimum=2, maximum=WINDOWS)
    """N of ``n_parity`` that tests ask for, and the last one of its curriculum."""
    window_curriculum: Literal["none", "single", "cumulative"] = setting("none")
    """How ``n_parity`` gets there: at once; or from 2 on, the next one as soon as 98 % of answers
    are right, with the earlier ones left out or kept. Rows have N + 2 to 4 N bits then."""
    reads: int = setting(1, minimum=1)
    """How often a row of ``disjointness`` shows its sets; ``length`` is that of one reading."""
    short_first: bool = False
    """Whether ``disjointness`` shows the short set first."""
    batch_size: int = setting(128, minimum=1)
    """Rows of a step."""
    steps: int = setting(1000, minimum=1)
    """Optimizer steps."""
    lr: float = setting(2e-3, above=0)
    """Peak learning rate."""
    warmup: float = setting(0.05, minimum=0, maximum=1)
    """Share of the steps in which the learning rate grows."""
    decay: Literal["cosine", "linear", "none"] = setting("cosine")
    """How the learning rate falls to 0 in the end, if it does."""
    decay_share: float = setting(1.0, minimum=0, maximum=1)
    """Share of the steps after the warm-up, the last ones, in which it falls."""
    weight_decay: float = setting(0.01, minimum=0)
    """AdamW's weight decay."""
    clip_grad: float = setting(1.0, above=0)
    """Largest global norm of the gradient."""
    test_rows: int = setting(512, minimum=1)
    """Rows to score at each length."""
    test_factors: list[int] = field(default_factory=lambda: list(TEST_FACTORS))
    """Lengths of test rows as multiples of ``length``."""
    test_recurrences: list[int] = field(default_factory=list)
    """Passes of the loop in tests; empty: as many as configured."""
    minutes: float | None = setting(None, above=0)
    """CPU minutes after which training stops unfinished; null: no limit."""
    seed: int = setting(0, minimum=0)
    """Seed of the model and of the rows."""

    def model(self, where: str = "config") -> ModelConfig:
        """Return the model's settings; alphabets differ, so embeddings are not tied."""
        for name in _OWN:
            if name in self.model_settings:
                raise ConfigError(
                    f"{where}: model_settings has {name}, expected {name} beside it, not in it"
                )
        values = {
            "tie_embeddings": False,
            **self.model_settings,
            "pattern": self.pattern,
            "hidden_size": self.hidden_size,
            "mixers": self.mixers,
            "mlp": {**self.model_settings.get("mlp", {}), "kind": self.mlp},
            "recursion": self.recursion,
            "init_std": self.init_std,
        }
        return build_config(ModelConfig, values, where)

    def options(self, windows: tuple[int, ...] = ()) -> Options:
        """Return the task's options; ``windows``: those of a step instead of the last one."""
        windows = windows or (self.window,)
        return Options(self.tokens_per_pair, windows, self.reads, self.short_first)


def check_config(config: SyntheticConfig, where: str) -> None:
    """Check settings that depend on each other; raises ConfigError naming the field."""
    model = config.model(where)
    for length in config.curriculum:
        if not 4 <= length <= config.length:
            raise ConfigError(
                f"{where}: curriculum names the length {length}, expected 4 to length = "
                f"{config.length}"
            )
    if config.steps <= len(config.curriculum):
        raise ConfigError(
            f"{where}: steps is {config.steps}, expected more than the {len(config.curriculum)} "
            "lengths of the curriculum"
        )
    if not config.test_factors or min(config.test_factors) < 1:
        raise ConfigError(
            f"{where}: test_factors is {config.test_factors}, expected whole numbers from 1 on"
        )
    _check_recurrences(config, model, where)
    _check_lengths(config, where)
    if config.task == "mqar":
        _check_pairs(config, where)


def _check_recurrences(config: SyntheticConfig, model: ModelConfig, where: str) -> None:
    loop, tested = model.recursion, config.test_recurrences
    if not tested:
        return
    if loop is None:
        raise ConfigError(f"{where}: test_recurrences is {tested}, but there is no recursion")
    most = loop.times if loop.lora_rank or loop.step_signal == "learned" else max(tested)
    if min(tested) < 1 or max(tested) > most:
        raise ConfigError(
            f"{where}: test_recurrences is {tested}, expected numbers from 1 to {most}, the passes "
            "that the loop has parameters for"
            if min(tested) >= 1
            else f"{where}: test_recurrences is {tested}, expected numbers from 1 on"
        )


def _check_lengths(config: SyntheticConfig, where: str) -> None:
    """Check the lengths of tasks whose rows need a length, or have no more than one."""
    shortest = min(config.length, *config.curriculum, config.length)
    longest = config.length * max(config.test_factors)
    least, most = {
        "n_parity": (config.window + 2, longest),
        "disjointness": (3 * SHORT + 4, ELEMENTS + SHORT + 4),
        "addition": (9, 6 * HINTS + 8),
    }.get(config.task, (4, longest))
    assert config.task != "addition" or digits_of(most) == HINTS
    if shortest < least or longest > most:
        raise ConfigError(
            f"{where}: {config.task} has rows of {shortest} to {longest} tokens (length, "
            f"curriculum, test_factors), expected {least} to {most}"
        )


def _check_pairs(config: SyntheticConfig, where: str) -> None:
    for length in (config.length, *config.curriculum):
        if length % 2 or length < config.tokens_per_pair:
            raise ConfigError(
                f"{where}: a length of mqar is {length}, expected an even number, at least "
                f"tokens_per_pair = {config.tokens_per_pair}"
            )
    most = max(config.test_factors)
    pairs = most * config.length // config.tokens_per_pair
    if pairs > MQAR_KEYS:
        raise ConfigError(
            f"{where}: tokens_per_pair is {config.tokens_per_pair}, which makes {pairs} pairs "
            f"at {most} times the length, expected at most {MQAR_KEYS}"
        )
